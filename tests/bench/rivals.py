"""What a user would put in front of a bundle instead: FastAPI without batches, LitServe, and Ray Serve as its textbook
has it, each calling the same `Predictor`.

    python -m tests.bench.rivals fastapi|litserve BUNDLE PORT          (serves until it is ended)

`textbook` is deployed into the connected Ray: FastAPI in an ingress, the model behind it with `@serve.batch`.
"""

import sys
from typing import Any

import litserve as ls
import litserve.server as server_module

BATCH = 16


def fastapi(bundle: str, port: int) -> None:
    """One request, one forward pass, in FastAPI's thread pool."""
    import threading

    import uvicorn
    from fastapi import Body, FastAPI

    from mmagent.predictor import Predictor

    predictor, lock, app = Predictor.load(bundle, threads=1, cache_mb=0), threading.Lock(), FastAPI()

    @app.post("/v1/predict")
    def predict(row: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008
        with lock:
            return predictor.predict([row])[0].to_dict()

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


class Api(ls.LitAPI):
    """At the top of its module: LitServe sends it to a process of its own."""

    def __init__(self, bundle: str) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=0.005, api_path="/v1/predict")
        self.bundle = bundle

    def setup(self, device: str) -> None:
        from mmagent.predictor import Predictor

        self.predictor = Predictor.load(self.bundle, threads=1, cache_mb=0)

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, rows: list[Any]) -> list[Any]:
        return self.predictor.predict(rows)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, answer: Any) -> dict[str, Any]:
        return dict(answer.to_dict())


def litserve(bundle: str, port: int) -> None:
    """Batches of 16 in one worker."""
    server_module._MCP_AVAILABLE = False  # 0.2.19 takes the mcp of another version for one that it knows
    server = ls.LitServer(Api(bundle), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")


def textbook(bundle: str) -> Any:
    """The Serve application."""
    from fastapi import Body, FastAPI
    from ray import serve

    app = FastAPI()

    class Model:
        def __init__(self, place: str) -> None:
            from mmagent.predictor import Predictor

            self.predictor = Predictor.load(place, threads=1, cache_mb=0)

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.005)
        async def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [answer.to_dict() for answer in self.predictor.predict(rows)]

    @serve.ingress(app)
    class Ingress:
        def __init__(self, model: Any) -> None:
            self.model = model

        @app.post("/v1/predict")
        async def predict(self, row: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008
            return dict(await self.model.remote(row))

    deployed: Any = serve.deployment(name="model", ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=256)(Model)
    front: Any = serve.deployment(name="front", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=256)(Ingress)
    return front.bind(deployed.bind(bundle))


if __name__ == "__main__":
    {"fastapi": fastapi, "litserve": litserve}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
