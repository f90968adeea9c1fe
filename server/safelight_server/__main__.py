"""`python -m safelight_server` is the command line `safelight`."""

from safelight_server.cli.main import main

if __name__ == "__main__":
    main()
