"""What the gateway does under load and faults, each part in a file of its own."""
