"""OpenAI's HTTP API over one engine: what people already call, with an adapter per request.

:func:`flora_jax.serve.http.app.make_app` makes the application of a
:class:`~flora_jax.serve.http.runner.Runner`, :func:`flora_jax.serve.http.server.serve` runs it. Needs
the extra ``serve``.
"""
