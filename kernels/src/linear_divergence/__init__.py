"""Two output layers and the divergence of their distributions in one."""
