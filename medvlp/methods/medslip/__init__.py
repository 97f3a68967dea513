"""MeDSLIP: the method, its keys, its losses and the modules it alone uses."""
