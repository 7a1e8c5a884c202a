//! A context: the key-value cache and the computation of batches.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use llama_cpp_sys_2 as sys;
use slmops_api::runtime::KvType;

use super::pace::{self, Pace};
use super::{Adapter, EngineError, Model, Token, log};

/// The engine allots context in steps of this many tokens for each sequence.
pub const CONTEXT_STEP_TOKENS: u32 = 256;

/// What a context is asked to be.
#[derive(Clone, Debug)]
pub struct ContextOptions {
    /// Tokens for each sequence.
    pub context_tokens: u32,
    /// Sequences decoded at the same time.
    pub sequences: u32,
    /// Tokens in one batch, at most.
    pub batch_tokens: u32,
    /// Tokens whose logits (or embeddings) one batch may ask for, at most: each costs memory for
    /// one row of the vocabulary, twice. 0 means all of them.
    pub outputs: u32,
    /// Compute threads; 0 means one for each core that this process may use, and fewer while other
    /// programs want the cores.
    pub threads: u32,
    /// Number format of the key-value cache.
    pub kv_type: KvType,
    /// Whether fused attention is used.
    pub flash_attention: bool,
    /// Whether [`Context::embedding`] is wanted.
    pub embeddings: bool,
    /// Ends a running computation with an error once it is true.
    pub abort: Option<Arc<AtomicBool>>,
}

impl Default for ContextOptions {
    fn default() -> Self {
        Self {
            context_tokens: 2048,
            sequences: 1,
            batch_tokens: 512,
            outputs: 0,
            threads: 0,
            kv_type: KvType::F16,
            flash_attention: true,
            embeddings: false,
            abort: None,
        }
    }
}

/// Tokens to compute in one go.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    tokens: Vec<Token>,
    positions: Vec<i32>,
    sequences: Vec<i32>,
    outputs: Vec<i8>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a token at its position in a sequence; `output` asks for its logits. Returns its index.
    pub fn push(&mut self, token: Token, position: u32, sequence: u32, output: bool) -> usize {
        self.tokens.push(token);
        self.positions.push(i32::try_from(position).unwrap_or(i32::MAX));
        self.sequences.push(i32::try_from(sequence).unwrap_or(i32::MAX));
        self.outputs.push(i8::from(output));
        self.tokens.len() - 1
    }

    /// Tokens in it.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Removes all tokens.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.outputs.clear();
    }

    /// Tokens that ask for their logits.
    pub fn output_count(&self) -> usize {
        self.outputs.iter().filter(|output| **output != 0).count()
    }
}

/// A model's working memory: a key-value cache for some sequences, and buffers.
pub struct Context {
    raw: NonNull<sys::llama_context>,
    model: Arc<Model>,
    /// Which tokens of the last batch have logits.
    outputs: Vec<i8>,
    output_limit: usize,
    /// Absent where the number of threads is fixed.
    pace: Option<Pace>,
    options: ContextOptions,
    reported: Reported,
    /// Those that are applied: the engine keeps their addresses.
    adapters: Vec<Arc<Adapter>>,
    _abort: Option<Arc<AtomicBool>>,
}

/// What the engine logged of itself and offers no function for.
#[derive(Clone, Debug, Default)]
struct Reported {
    flash_attention: Option<bool>,
    kv_types: Option<(String, String)>,
}

// SAFETY: a context has no ties to the thread that made it; `&mut` keeps its use exclusive.
unsafe impl Send for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the library and is freed once, before the model.
        unsafe { sys::llama_free(self.raw.as_ptr()) };
    }
}

impl Context {
    /// Makes a context for `model`.
    ///
    /// # Errors
    /// Memory is short, or the engine refuses the combination.
    pub fn new(model: &Arc<Model>, options: &ContextOptions) -> Result<Self, EngineError> {
        let failed = |cause: String| EngineError::Context {
            context_tokens: options.context_tokens,
            sequences: options.sequences,
            cause,
        };
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
            threads => threads,
        };
        let threads = i32::try_from(threads).map_err(|_| failed("too many threads".to_owned()))?;
        let total = options
            .context_tokens
            .checked_next_multiple_of(CONTEXT_STEP_TOKENS)
            .and_then(|tokens| tokens.checked_mul(options.sequences))
            .filter(|tokens| *tokens > 0)
            .ok_or_else(|| failed("that is no size".to_owned()))?;
        let outputs = match options.outputs {
            0 => options.batch_tokens,
            outputs => outputs.max(options.sequences).min(options.batch_tokens),
        };
        let (raw, lines) = log::capture(None, || {
            // SAFETY: the parameters are the library's defaults with plain values changed; the
            // flag behind the abort callback is kept alive by the context.
            unsafe {
                let mut params = sys::llama_context_default_params();
                params.n_ctx = total;
                params.n_batch = options.batch_tokens;
                params.n_ubatch = options.batch_tokens;
                params.n_seq_max = options.sequences;
                params.n_outputs_max = outputs;
                params.n_threads = threads;
                params.n_threads_batch = threads;
                params.type_k = kv_type(options.kv_type);
                params.type_v = kv_type(options.kv_type);
                params.flash_attn_type = match options.flash_attention {
                    true => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
                    false => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
                };
                params.embeddings = options.embeddings;
                params.kv_unified = false;
                params.offload_kqv = false;
                params.no_perf = true;
                if let Some(abort) = &options.abort {
                    params.abort_callback = Some(on_abort_check);
                    params.abort_callback_data = Arc::as_ptr(abort).cast_mut().cast::<c_void>();
                }
                sys::llama_init_from_model(model.raw(), params)
            }
        });
        let raw = NonNull::new(raw)
            .ok_or_else(|| failed(log::errors(&lines, "the engine gives no reason")))?;
        // SAFETY: `raw` is a live context.
        let batch = unsafe { sys::llama_n_batch(raw.as_ptr()) };
        Ok(Self {
            raw,
            model: Arc::clone(model),
            outputs: Vec::new(),
            output_limit: outputs.min(batch) as usize,
            pace: (options.threads == 0).then(|| Pace::new(threads.cast_unsigned())),
            options: options.clone(),
            reported: Reported::read(&lines),
            adapters: Vec::new(),
            _abort: options.abort.clone(),
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Tokens of context that the engine allotted to each sequence (rounded up to
    /// [`CONTEXT_STEP_TOKENS`]).
    pub fn context_tokens(&self) -> u32 {
        // SAFETY: `raw` is a live context.
        unsafe { sys::llama_n_ctx_seq(self.raw.as_ptr()) }
    }

    /// Sequences decoded at the same time.
    pub fn sequences(&self) -> u32 {
        // SAFETY: `raw` is a live context.
        unsafe { sys::llama_n_seq_max(self.raw.as_ptr()) }
    }

    /// Tokens in one batch, at most.
    pub fn batch_tokens(&self) -> u32 {
        // SAFETY: `raw` is a live context.
        unsafe { sys::llama_n_batch(self.raw.as_ptr()) }
    }

    /// Outputs of one batch, at most.
    pub fn output_limit(&self) -> usize {
        self.output_limit
    }

    /// Compute threads.
    pub fn threads(&self) -> u32 {
        // SAFETY: `raw` is a live context.
        unsafe { sys::llama_n_threads(self.raw.as_ptr()) }.max(0).cast_unsigned()
    }

    /// Whether the number of threads is left to the engine and others use the cores, or nothing is
    /// known about them yet.
    pub fn is_crowded(&self) -> bool {
        self.pace.as_ref().is_some_and(Pace::is_crowded)
    }

    fn set_threads(&mut self, threads: u32) {
        let threads = i32::try_from(threads.max(1)).unwrap_or(i32::MAX);
        // SAFETY: `raw` is a live context that nothing else uses.
        unsafe { sys::llama_set_n_threads(self.raw.as_ptr(), threads, threads) }
    }

    /// Whether the engine says it uses fused attention; absent where it says nothing.
    pub fn flash_attention(&self) -> Option<bool> {
        self.reported.flash_attention
    }

    /// The number format of the key-value cache as the engine says; absent where it says nothing
    /// that we know, or where keys and values differ.
    pub fn kv_type(&self) -> Option<KvType> {
        let (keys, values) = self.reported.kv_types.as_ref()?;
        (keys == values).then_some(())?;
        match keys.as_str() {
            "f32" => Some(KvType::F32),
            "f16" => Some(KvType::F16),
            "q8_0" => Some(KvType::Q8_0),
            _ => None,
        }
    }

    /// Applies adapters of the context's model, each with its factor, in what is computed from now on.
    /// A change makes the engine plan its computation anew.
    pub fn set_adapters(&mut self, adapters: &[(Arc<Adapter>, f32)]) {
        assert!(adapters.iter().all(|(it, _)| it.is_of(&self.model)), "adapters of another model");
        let mut raw: Vec<_> = adapters.iter().map(|(adapter, _)| adapter.raw()).collect();
        let mut scales: Vec<f32> = adapters.iter().map(|(_, scale)| *scale).collect();
        // SAFETY: both arrays have the length that is given, the adapters belong to the model of this
        // live context, and they are kept until others take their place.
        unsafe {
            sys::llama_set_adapters_lora(
                self.raw.as_ptr(),
                raw.as_mut_ptr(),
                raw.len(),
                scales.as_mut_ptr(),
            );
        }
        self.adapters = adapters.iter().map(|(adapter, _)| Arc::clone(adapter)).collect();
    }

    /// Computes a batch; the logits of tokens pushed with `output` can be read until the next one.
    ///
    /// # Errors
    /// The batch breaks a limit of the context, or the computation failed; then the memory of the
    /// sequences in it may hold a part of it.
    pub fn decode(&mut self, batch: &mut Batch) -> Result<(), EngineError> {
        let tokens = batch.len();
        let failed = |cause: String| EngineError::Decode { tokens, cause };
        if tokens == 0 {
            return Ok(());
        }
        let limit = self.batch_tokens() as usize;
        if tokens > limit {
            return Err(failed(format!("at most {limit} tokens fit")));
        }
        if batch.output_count() > self.output_limit {
            return Err(failed(format!("at most {} outputs fit", self.output_limit)));
        }
        let vocabulary = self.model.vocabulary();
        let sequences = self.sequences();
        if let Some(token) =
            batch.tokens.iter().find(|token| **token < 0 || token.cast_unsigned() >= vocabulary)
        {
            return Err(failed(format!("{token} is not in the vocabulary of {vocabulary} tokens")));
        }
        if batch.sequences.iter().any(|sequence| sequence.cast_unsigned() >= sequences) {
            return Err(failed(format!("there are only {sequences} sequences")));
        }
        self.outputs.clear();
        let mut counts = vec![1_i32; tokens];
        let mut ids: Vec<*mut i32> =
            batch.sequences.iter_mut().map(std::ptr::from_mut::<i32>).collect();
        let raw_batch = sys::llama_batch {
            n_tokens: i32::try_from(tokens).map_err(|_| failed("it is too long".to_owned()))?,
            token: batch.tokens.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: batch.positions.as_mut_ptr(),
            n_seq_id: counts.as_mut_ptr(),
            seq_id: ids.as_mut_ptr(),
            logits: batch.outputs.as_mut_ptr(),
        };
        let waited_before = self.pace.as_ref().and_then(|_| pace::waited_for_a_core());
        let started = Instant::now();
        // SAFETY: every array has `n_tokens` entries and outlives the call; tokens and sequences
        // are in range; the outputs fit (the library asserts it).
        let code = unsafe { sys::llama_decode(self.raw.as_ptr(), raw_batch) };
        if let (Some(pace), Some(before)) = (&mut self.pace, waited_before)
            && let Some(after) = pace::waited_for_a_core()
            && let Some(threads) = pace.observe(started.elapsed(), after.saturating_sub(before))
        {
            self.set_threads(threads);
        }
        match code {
            0 => {
                self.outputs.extend_from_slice(&batch.outputs);
                Ok(())
            }
            1 => Err(failed("the context is full".to_owned())),
            2 => Err(failed("it was aborted".to_owned())),
            -1 => Err(failed("its positions do not continue their sequences".to_owned())),
            code => Err(failed(format!("the engine failed with code {code}"))),
        }
    }

    fn has_output(&self, index: usize) -> Option<i32> {
        (self.outputs.get(index).copied().unwrap_or(0) != 0).then_some(())?;
        i32::try_from(index).ok()
    }

    /// The logits `[vocabulary]` of token `index` of the last batch; absent where none were asked
    /// for or the batch failed.
    pub fn logits(&self, index: usize) -> Option<&[f32]> {
        let index = self.has_output(index)?;
        // SAFETY: the index had its output flag set in the last batch, so the row exists, has one
        // value for each token of the vocabulary, and stays until the next `&mut self` call.
        unsafe {
            let row = sys::llama_get_logits_ith(self.raw.as_ptr(), index);
            (!row.is_null())
                .then(|| std::slice::from_raw_parts(row, self.model.vocabulary() as usize))
        }
    }

    /// The last layer's output `[embedding]` at token `index` of the last batch; absent unless the
    /// context was made with `embeddings` and the token asked for output.
    pub fn embedding(&self, index: usize) -> Option<&[f32]> {
        let index = self.has_output(index)?;
        if !self.options.embeddings {
            return None;
        }
        // SAFETY: as for logits; a row has one value for each dimension of the model.
        unsafe {
            let width = sys::llama_model_n_embd_out(self.model.raw()).max(0).cast_unsigned();
            let row = sys::llama_get_embeddings_ith(self.raw.as_ptr(), index);
            (!row.is_null()).then(|| std::slice::from_raw_parts(row, width as usize))
        }
    }

    /// Whether embeddings are kept from now on; they cost a copy in each batch.
    pub fn set_embeddings(&mut self, wanted: bool) {
        self.outputs.clear();
        self.options.embeddings = wanted;
        // SAFETY: `raw` is a live context.
        unsafe { sys::llama_set_embeddings(self.raw.as_ptr(), wanted) };
    }

    fn memory(&self) -> sys::llama_memory_t {
        // SAFETY: `raw` is a live context.
        unsafe { sys::llama_get_memory(self.raw.as_ptr()) }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        let memory = self.memory();
        if !memory.is_null() {
            // SAFETY: the memory belongs to this context.
            unsafe { sys::llama_memory_clear(memory, false) };
        }
    }

    /// Forgets a sequence from `position` on. False where the engine cannot forget a part; then
    /// nothing changed.
    pub fn truncate(&mut self, sequence: u32, position: u32) -> bool {
        let memory = self.memory();
        let (Ok(sequence), Ok(position)) = (i32::try_from(sequence), i32::try_from(position))
        else {
            return false;
        };
        if memory.is_null() {
            return false;
        }
        // SAFETY: the memory belongs to this context; the library checks the range of the sequence.
        unsafe { sys::llama_memory_seq_rm(memory, sequence, position, -1) }
    }

    /// Whether [`Context::remove`] is possible with this model.
    pub fn can_shift(&self) -> bool {
        let memory = self.memory();
        // SAFETY: the memory belongs to this context.
        !memory.is_null() && unsafe { sys::llama_memory_can_shift(memory) }
    }

    /// Forgets the positions `from` to `to` of a sequence (`to` not included); those after them take
    /// their place.
    pub fn remove(&mut self, sequence: u32, from: u32, to: u32) {
        assert!(self.can_shift() && sequence < self.sequences() && from <= to, "nothing to shift");
        let [sequence, from, to] = [sequence, from, to].map(u32::cast_signed);
        let memory = self.memory();
        // SAFETY: the memory belongs to this context and can be shifted, and the sequence exists.
        unsafe {
            if sys::llama_memory_seq_rm(memory, sequence, from, to) {
                sys::llama_memory_seq_add(memory, sequence, to, -1, from - to);
            }
        }
    }

    /// How many bytes [`Context::state`] of a sequence has.
    pub fn state_bytes(&self, sequence: u32) -> u64 {
        assert!(sequence < self.sequences(), "there is no sequence {sequence}");
        // SAFETY: `raw` is a live context, and the sequence exists.
        unsafe { sys::llama_state_seq_get_size(self.raw.as_ptr(), sequence.cast_signed()) as u64 }
    }

    /// What is in memory of a sequence, for [`Context::set_state`] of a context with the same model and
    /// formats on the same build of the engine; absent where the engine cannot tell.
    pub fn state(&self, sequence: u32) -> Option<Vec<u8>> {
        let mut state = vec![0; usize::try_from(self.state_bytes(sequence)).ok()?];
        // SAFETY: the buffer is valid for its length, and the sequence exists.
        let written = unsafe {
            sys::llama_state_seq_get_data(
                self.raw.as_ptr(),
                state.as_mut_ptr(),
                state.len(),
                sequence.cast_signed(),
            )
        };
        (written > 0 && written == state.len()).then_some(state)
    }

    /// Puts the state of a sequence of so many tokens in the place of a sequence. False where the engine
    /// does not take it; then nothing is certain of the sequence.
    pub fn set_state(&mut self, sequence: u32, state: &[u8], tokens: usize) -> bool {
        assert!(sequence < self.sequences(), "there is no sequence {sequence}");
        let memory = self.memory();
        // SAFETY: the bytes are valid for their length, which the library does not read beyond; the
        // sequence exists, and the memory belongs to this context.
        let (read, last) = unsafe {
            let sequence = sequence.cast_signed();
            let read = sys::llama_state_seq_set_data(
                self.raw.as_ptr(),
                state.as_ptr(),
                state.len(),
                sequence,
            );
            (read, sys::llama_memory_seq_pos_max(memory, sequence))
        };
        read == state.len() && i64::from(last) + 1 == tokens as i64
    }

    /// Copies a whole sequence to another, replacing it. Attention to copied tokens is exact.
    pub fn copy(&mut self, from: u32, to: u32) {
        let memory = self.memory();
        if memory.is_null() || from.max(to) >= self.sequences() || from == to {
            return;
        }
        // SAFETY: the memory belongs to this context, and both sequences exist.
        unsafe {
            sys::llama_memory_seq_rm(memory, to.cast_signed(), -1, -1);
            sys::llama_memory_seq_cp(memory, from.cast_signed(), to.cast_signed(), -1, -1);
        }
    }
}

fn kv_type(kv_type: KvType) -> sys::ggml_type {
    match kv_type {
        KvType::F32 => sys::GGML_TYPE_F32,
        KvType::F16 => sys::GGML_TYPE_F16,
        KvType::Q8_0 => sys::GGML_TYPE_Q8_0,
    }
}

unsafe extern "C" fn on_abort_check(flag: *mut c_void) -> bool {
    // SAFETY: the context holds an `Arc` of the flag for as long as it lives.
    unsafe { &*flag.cast::<AtomicBool>() }.load(Ordering::Relaxed)
}

impl Reported {
    /// Reads the engine's lines `llama_context: flash_attn = enabled` and
    /// `llama_kv_cache: size = …, K (f16): …, V (f16): …`.
    fn read(lines: &[log::Line]) -> Self {
        let mut reported = Self::default();
        for line in lines {
            if let Some((_, rest)) = line.text.split_once("flash_attn")
                && let Some((_, value)) = rest.split_once('=')
            {
                reported.flash_attention = match value.trim() {
                    "enabled" | "1" | "true" => Some(true),
                    "disabled" | "0" | "false" => Some(false),
                    _ => reported.flash_attention,
                };
            }
            let named = |label: &str| -> Option<String> {
                let (_, rest) = line.text.split_once(label)?;
                Some(rest.split_once(')')?.0.to_owned())
            };
            if let (Some(keys), Some(values)) = (named(", K ("), named(", V (")) {
                reported.kv_types = Some((keys, values));
            }
        }
        reported
    }
}
