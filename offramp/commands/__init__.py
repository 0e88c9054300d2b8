"""What the commands of the command line do: the only code that may import everything."""
