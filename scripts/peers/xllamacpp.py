"""llama.cpp's own server, as PyPI `xllamacpp` carries it."""

import threading

import xllamacpp
from peer import answers_at, end_with_parent, options

given = options()
end_with_parent()
params = xllamacpp.CommonParams()
params.model.path = given.model
# Its context is that of all sequences together, which share it equally.
params.n_ctx = given.context * given.parallel
params.n_parallel = given.parallel
params.kv_unified = False
params.n_batch = given.batch
params.n_ubatch = given.batch
params.cpuparams.n_threads = given.threads
params.cpuparams_batch.n_threads = given.threads
params.fit_params = False
params.n_gpu_layers = 0
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
params.verbosity = -1
params.ui = False
server = xllamacpp.Server(params)
answers_at(server.listening_address)
threading.Event().wait()
