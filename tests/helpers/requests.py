"""Requests in one line, for tests."""

import dataclasses

from flora_jax.serve.request import Request, SamplingParams


def make_request(fold_in, prompt_token_ids, adapter=None, request_id=None, **settings):
    """A request with these sampling parameters; the engine names it unless ``request_id`` does."""
    return Request(prompt_token_ids, SamplingParams(**settings), adapter, request_id, fold_in)


def with_settings(request, **settings):
    """The same request under other sampling parameters."""
    params = dataclasses.replace(request.sampling_params, **settings)
    return dataclasses.replace(request, sampling_params=params)
