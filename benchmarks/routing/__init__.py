"""What a change costs when many each follow something of their own."""
