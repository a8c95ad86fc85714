"""What the device is: backend, capabilities, and the CPU redirection."""
