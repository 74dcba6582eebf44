"""One plain function per command, also for use from Python."""
