"""The report: what a trace, a policy and a certificate say, as one page for people. Reads only; runs no model."""
