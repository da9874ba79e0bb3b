"""Launching: environments (launch/env) and the runners that turn a plan into processes."""
