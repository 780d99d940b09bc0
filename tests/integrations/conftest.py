"""Which of these tests may fetch packages that are too large for every run of the suite."""

import pytest


@pytest.fixture(scope="module")
def may_fetch(request: pytest.FixtureRequest) -> None:
    """A run that asks for these tests by their mark, as scripts/test_integrations.sh does."""
    if "integrations" not in request.config.option.markexpr:
        pytest.skip("fetches tens of megabytes: bash scripts/test_integrations.sh")
