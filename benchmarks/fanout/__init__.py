"""One change to many clients: data-bridge, the bare limit and other ways, in one run."""
