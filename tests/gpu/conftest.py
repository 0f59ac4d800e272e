"""Tests on a CUDA GPU; MOMKIT_PROFILE=cuda unless the environment says otherwise."""

import os

import pytest


@pytest.fixture(autouse=True)
def cuda_profile(monkeypatch):
    monkeypatch.setenv("MOMKIT_PROFILE", os.environ.get("MOMKIT_PROFILE", "cuda"))
