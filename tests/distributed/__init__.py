"""Two real ranks on this machine."""
