"""Answers requests over HTTP: the routes, the limits of an upload, and the page on which images are dropped."""
