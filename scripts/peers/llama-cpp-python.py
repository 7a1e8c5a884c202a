"""The server of PyPI `llama-cpp-python`, which answers one request at a time."""

import socket

import uvicorn
from llama_cpp.server.app import create_app
from llama_cpp.server.settings import ModelSettings, ServerSettings
from peer import answers_at, end_with_parent, options

given = options()
end_with_parent()
model = ModelSettings(
    model=given.model,
    n_ctx=given.context,
    n_batch=given.batch,
    n_ubatch=given.batch,
    n_threads=given.threads,
    n_threads_batch=given.threads,
    n_gpu_layers=0,
    flash_attn=True,
    verbose=False,
)
# By default a request ends the one before it.
settings = ServerSettings(interrupt_requests=False)
app = create_app(server_settings=settings, model_settings=[model])
listener = socket.create_server(("127.0.0.1", 0), backlog=512)
answers_at("http://127.0.0.1:%d" % listener.getsockname()[1])
uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])
