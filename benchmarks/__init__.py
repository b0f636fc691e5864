"""Speed and memory of the layers, each against torch's own."""
