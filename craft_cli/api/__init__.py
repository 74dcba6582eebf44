"""One plain function a command, which Python users call too."""
