"""The command line: a client of the server, and the command that starts one."""
