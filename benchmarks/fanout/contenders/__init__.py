"""The contenders in Python: each a function that gives an ASGI application.

All send the same: one event per change, the operation as its name, the resume token as its id,
``{"operation", "id", "document"}`` as its data. The shared ones make the JSON once per change; code
that runs for each client makes it for each client, as such code does. A comment as the first bytes
says that a client is subscribed, where the library itself says nothing.
"""
