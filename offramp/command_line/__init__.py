"""The commands as click sees them: parse, call one function, print. Heavy imports happen inside the commands.

Environment variables are read here only.
"""
