"""An engine that stays, for the tests: a real process at a real socket, which speaks the few
calls of vLLM's server that ours makes. It computes with plain transformers, or, where a policy
has no model (the pretended stages), not at all.
"""

import http.client
import json
import os
import socket
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

ONE_BY_ONE = threading.Lock()
STATE = {"folder": "", "stuck": False}  # what it was last given; whether it forgets to read it


class AtSocket(http.client.HTTPConnection):
    "HTTP over a socket."

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)


def ask(base_url, where, body=None):
    "What the engine at this address replies."
    connection = AtSocket(base_url.removeprefix("unix:"))
    connection.request("POST", where, json.dumps(body or {}))
    return json.loads(connection.getresponse().read())


@cache
def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logps(model, ids):
    import torch

    with torch.inference_mode():
        table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return table


def draw(body, k):
    "A sample, with random numbers of its own seed."
    import torch

    model, ids, told = load(STATE["folder"]), list(body["prompt"]), []
    generator = torch.Generator().manual_seed(body["seed"] + k)
    while len(told) < body["max_tokens"] and (
        not told or ids[-1] not in body["stop_token_ids"]
    ):
        row = logps(model, ids)[-1]
        token = int(torch.multinomial(row.exp(), 1, generator=generator))
        ids.append(token)
        told.append(float(row[token]))
    drawn = ids[len(body["prompt"]) :]
    end = "stop" if drawn[-1] in body["stop_token_ids"] else "length"
    own = dict(index=k, token_ids=drawn, prompt_token_ids=body["prompt"], finish_reason=end)
    return own | dict(logprobs=dict(token_logprobs=told))


def score(ids):
    "A text's log-probabilities, as vLLM tells them."
    table = logps(load(STATE["folder"]), ids)
    steps = [{str(t): dict(logprob=float(table[i, t]))} for i, t in enumerate(ids[1:])]
    return dict(index=0, prompt_logprobs=[None, *steps])


def reply(where, body):
    if where == "/collective_rpc":
        if body["method"] == "reload_from" and not STATE["stuck"]:
            [STATE["folder"]] = body["args"]
        return dict(results=[STATE["folder"]])
    if where == "/v1/completions":
        if "prompt_logprobs" in body:
            return dict(choices=[score(body["prompt"])])
        return dict(choices=[draw(body, k) for k in range(body["n"])])
    if where == "/die":
        os._exit(3)
    return dict(pid=os.getpid())


class Engine(BaseHTTPRequestHandler):
    def answer(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        with ONE_BY_ONE:
            data = json.dumps(reply(self.path.partition("?")[0], body)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer

    def address_string(self):
        return "a socket"

    def log_message(self, *args):
        pass


def main():
    cfg = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    STATE.update(folder=cfg["model"], stuck=cfg["seed"] == 13)
    path = Path(cfg["base_url"].removeprefix("unix:"))
    path.unlink(missing_ok=True)
    print("listening", flush=True)
    os.chdir(path.parent)  # a short name
    ThreadingUnixStreamServer(path.name, Engine).serve_forever()


if __name__ == "__main__":
    main()
