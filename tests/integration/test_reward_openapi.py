"""Fuzzing of the reward server's OpenAPI description: what is promised is kept, and nothing ends in a 5xx."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import starter_scorer

from reward_server.app import create_app
from reward_server.settings import RewardServerSettings

KEY = "fuzz"
SETTINGS = RewardServerSettings(api_key=KEY)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A real server of the starter model in a thread, with a key."""
    scorer = starter_scorer()
    app = create_app(SETTINGS, load=lambda _: scorer)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {KEY}"}) as client:
                while client.get(f"{url}/health").status_code != 200:
                    time.sleep(0.05)
            yield url
        finally:
            server.should_exit = True
            thread.join()


schema = schemathesis.openapi.from_dict(create_app(SETTINGS).openapi())


@schema.parametrize()
@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described(case: schemathesis.Case, address: str) -> None:
    response = case.call(base_url=address, headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code < 500, response.text
    # A schema counts characters, the model tokens: a URL of 2,000 digits is described as fine and yet too long for it.
    over_the_models_limit = response.status_code == 422 and "tokens that the reward model reads" in response.text
    case.validate_response(response, excluded_checks=[positive_data_acceptance] if over_the_models_limit else [])


def test_every_refusal_is_described(address: str) -> None:
    paths = httpx.get(f"{address}/openapi.json", trust_env=False).json()["paths"]
    assert set(paths["/score"]["post"]["responses"]) == {"200", "401", "413", "422", "429", "500", "503"}
    assert set(paths["/score/batch"]["post"]["responses"]) == set(paths["/score"]["post"]["responses"])
    assert set(paths["/metrics"]["get"]["responses"]) == {"200", "401", "413", "500"}
    assert set(paths["/health"]["get"]["responses"]) == {"200", "401", "413", "500", "503"}
    body = paths["/score/batch"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert (body["minItems"], body["maxItems"]) == (1, 128)
