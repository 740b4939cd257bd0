"""From a resume token to typed changes and to SSE bytes, against the drivers' own loops."""
