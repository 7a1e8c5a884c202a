//! A loaded model: its vocabulary, metadata and dimensions.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ffi::{CStr, CString, c_char};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;
use slmops_artifact::shape::ModelShape;

use super::{EngineError, Token, log, start};

/// The most bytes of one metadata value that is read.
const MAX_METADATA_BYTES: usize = 16 << 20;

/// How a model file is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Map the file instead of reading it: pages are shared between processes and can be dropped,
    /// but a tensor that is repacked is then in memory twice.
    pub mmap: bool,
    /// Bring some tensors into a layout that this processor computes faster.
    pub repack: bool,
    /// Refuse weights that are not finite numbers. Reads the whole file.
    pub check_tensors: bool,
    /// Load the vocabulary alone.
    pub vocabulary_only: bool,
}

impl Default for LoadOptions {
    /// Reads the file: which tensors are repacked depends on the processor, and only without a
    /// mapped copy beside them is the memory the same on each device (measured with a Q4_0 of
    /// 135 million parameters: 216 MiB instead of 272 MiB, and loading takes 0.1 s longer).
    fn default() -> Self {
        Self { mmap: false, repack: true, check_tensors: false, vocabulary_only: false }
    }
}

/// A loaded model.
pub struct Model {
    raw: NonNull<sys::llama_model>,
    vocabulary: NonNull<sys::llama_vocab>,
    /// The characters that can be tokenised, where not all can; see [`Model::spellable`].
    characters: Option<HashSet<char>>,
}

// SAFETY: the library never changes a model after loading; its tokenizer is documented as
// thread-safe ("The API is thread-safe", llama.h, Tokenization).
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: `raw` came from a load and is freed once; contexts hold an `Arc` of the model.
        unsafe { sys::llama_model_free(self.raw.as_ptr()) };
    }
}

impl Model {
    /// Loads the GGUF file at `path`.
    ///
    /// # Errors
    /// The file is missing, damaged, or of an architecture that the engine does not know.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self, EngineError> {
        start();
        let failed = |cause: String| EngineError::Load { path: path.to_owned(), cause };
        std::fs::File::open(path).map_err(|error| failed(error.to_string()))?;
        let c_path = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| failed("its path has a NUL byte".to_owned()))?;
        let (raw, lines) = log::capture(None, || {
            // SAFETY: the parameters are the library's defaults with plain values changed, and the
            // path outlives the call.
            unsafe {
                let mut params = sys::llama_model_default_params();
                params.n_gpu_layers = 0;
                params.load_mode = match options.mmap {
                    true => sys::LLAMA_LOAD_MODE_MMAP,
                    false => sys::LLAMA_LOAD_MODE_NONE,
                };
                params.use_extra_bufts = options.repack;
                params.check_tensors = options.check_tensors;
                params.vocab_only = options.vocabulary_only;
                sys::llama_model_load_from_file(c_path.as_ptr(), params)
            }
        });
        let raw = NonNull::new(raw)
            .ok_or_else(|| failed(log::errors(&lines, "the engine gives no reason")))?;
        // SAFETY: `raw` is a live model.
        let vocabulary = unsafe { sys::llama_model_get_vocab(raw.as_ptr()) };
        match NonNull::new(vocabulary.cast_mut()) {
            Some(vocabulary) => {
                let mut model = Self { raw, vocabulary, characters: None };
                model.characters = model.known_characters();
                Ok(model)
            }
            None => {
                // SAFETY: `raw` is a live model that nothing else holds.
                unsafe { sys::llama_model_free(raw.as_ptr()) };
                Err(failed("it has no vocabulary".to_owned()))
            }
        }
    }

    pub(super) fn raw(&self) -> *mut sys::llama_model {
        self.raw.as_ptr()
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        self.vocabulary.as_ptr()
    }

    /// Tokens in the vocabulary.
    pub fn vocabulary(&self) -> u32 {
        // SAFETY: the vocabulary lives as long as the model.
        unsafe { sys::llama_vocab_n_tokens(self.vocab()) }.max(0).cast_unsigned()
    }

    /// Longest context trained for, in tokens.
    pub fn trained_context(&self) -> u32 {
        // SAFETY: `raw` is a live model.
        unsafe { sys::llama_model_n_ctx_train(self.raw()) }.max(0).cast_unsigned()
    }

    /// Width of the residual stream.
    pub fn embedding_width(&self) -> u32 {
        // SAFETY: `raw` is a live model.
        unsafe { sys::llama_model_n_embd(self.raw()) }.max(0).cast_unsigned()
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        // SAFETY: `raw` is a live model.
        unsafe { sys::llama_model_size(self.raw()) }
    }

    /// Whether the model generates text (has a decoder).
    pub fn generates(&self) -> bool {
        // SAFETY: `raw` is a live model.
        unsafe {
            sys::llama_model_has_decoder(self.raw()) && !sys::llama_model_is_diffusion(self.raw())
        }
    }

    /// Whether parts of a sequence can be dropped from memory (false for recurrent models).
    pub fn forgets_parts(&self) -> bool {
        // SAFETY: `raw` is a live model.
        unsafe {
            !sys::llama_model_is_recurrent(self.raw()) && !sys::llama_model_is_hybrid(self.raw())
        }
    }

    /// The GGUF file type's name, such as `Q4_K - Medium`.
    pub fn file_type(&self) -> String {
        // SAFETY: `raw` is a live model; the name is a static string or null.
        let name = unsafe { sys::llama_ftype_name(sys::llama_model_ftype(self.raw())) };
        text(name).unwrap_or_default()
    }

    /// A scalar metadata value as text; absent where there is none of that key.
    pub fn metadata(&self, key: &str) -> Option<String> {
        let key = CString::new(key).ok()?;
        read_text(|buffer, length| {
            // SAFETY: the buffer has `length` bytes, and the key is NUL-terminated.
            unsafe { sys::llama_model_meta_val_str(self.raw(), key.as_ptr(), buffer, length) }
        })
    }

    /// The chat template of the model's own metadata (Jinja); `name` asks for one of several.
    pub fn chat_template(&self, name: Option<&str>) -> Option<String> {
        let name = name.map(CString::new).transpose().ok()?;
        let name = name.as_ref().map_or(std::ptr::null(), |name| name.as_ptr());
        // SAFETY: the name is null or NUL-terminated; the answer is null or lives with the model.
        text(unsafe { sys::llama_model_chat_template(self.raw(), name) })
    }

    /// The dimensions that decide the memory at run time.
    pub fn shape(&self) -> ModelShape {
        let architecture = self.metadata("general.architecture").unwrap_or_default();
        let number = |key: &str| -> Option<u32> {
            self.metadata(&format!("{architecture}.{key}"))?.parse().ok()
        };
        // SAFETY: `raw` is a live model.
        let (layers, heads, kv_heads, parameters) = unsafe {
            (
                sys::llama_model_n_layer(self.raw()).max(0).cast_unsigned(),
                sys::llama_model_n_head(self.raw()).max(0).cast_unsigned(),
                sys::llama_model_n_head_kv(self.raw()).max(0).cast_unsigned(),
                sys::llama_model_n_params(self.raw()),
            )
        };
        let embedding = self.embedding_width();
        let head_width = embedding.checked_div(heads).unwrap_or(0);
        ModelShape {
            parameters,
            layers,
            embedding,
            feed_forward: number("feed_forward_length").unwrap_or(0),
            heads,
            kv_heads,
            key_width: number("attention.key_length").unwrap_or(head_width),
            value_width: number("attention.value_length").unwrap_or(head_width),
            vocabulary: self.vocabulary(),
            trained_context: self.trained_context(),
            architecture,
        }
    }

    /// The characters of a SentencePiece vocabulary that lacks some byte tokens; absent where every
    /// byte has one, or where the tokenizer is of another kind.
    fn known_characters(&self) -> Option<HashSet<char>> {
        // SAFETY: the vocabulary lives as long as the model.
        if unsafe { sys::llama_vocab_type(self.vocab()) } != sys::LLAMA_VOCAB_TYPE_SPM {
            return None;
        }
        let mut characters = HashSet::new();
        let mut bytes = HashSet::new();
        for token in 0..self.vocabulary().cast_signed() {
            // SAFETY: the token is in the vocabulary; its text lives with the model.
            let Some(piece) = text(unsafe { sys::llama_vocab_get_text(self.vocab(), token) })
            else {
                continue;
            };
            let hex = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                bytes.insert(byte);
            }
            let mut letters = piece.chars();
            if let (Some(letter), None) = (letters.next(), letters.next()) {
                characters.insert(letter);
            }
        }
        (bytes.len() <= usize::from(u8::MAX)).then(|| {
            characters
                .extend(bytes.iter().filter(|byte| byte.is_ascii()).map(|&byte| byte as char));
            characters
        })
    }

    /// `text` with what the vocabulary cannot spell replaced by spaces: a character without a token
    /// is spelt in byte tokens, and the engine aborts the process where one of those is missing.
    fn spellable<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let Some(characters) = &self.characters else { return Cow::Borrowed(text) };
        // SentencePiece writes a space as U+2581.
        let known = |letter: char| letter == ' ' || characters.contains(&letter);
        if text.chars().all(known) {
            return Cow::Borrowed(text);
        }
        text.chars().map(|letter| if known(letter) { letter } else { ' ' }).collect()
    }

    /// The tokens of `text`. `add_special` adds what the model wants at the start and end (such as
    /// BOS); `parse_special` reads written control tokens (such as `<|im_start|>`) as such.
    ///
    /// # Errors
    /// The text is too long, or the model has no tokenizer.
    pub fn tokenise(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<Token>, EngineError> {
        let failed = |cause| EngineError::Tokenise { bytes: text.len(), cause };
        // SAFETY: the vocabulary lives as long as the model.
        if unsafe { sys::llama_vocab_type(self.vocab()) } == sys::LLAMA_VOCAB_TYPE_NONE {
            return Err(failed("the model has no tokenizer"));
        }
        let text = self.spellable(text);
        let failed = |cause| EngineError::Tokenise { bytes: text.len(), cause };
        let length = i32::try_from(text.len()).map_err(|_| failed("it is too long"))?;
        let mut tokens: Vec<Token> = vec![0; text.len() + 4];
        loop {
            let capacity = i32::try_from(tokens.len()).map_err(|_| failed("it is too long"))?;
            // SAFETY: both pointers are valid for the lengths given beside them.
            let count = unsafe {
                sys::llama_tokenize(
                    self.vocab(),
                    text.as_ptr().cast::<c_char>(),
                    length,
                    tokens.as_mut_ptr(),
                    capacity,
                    add_special,
                    parse_special,
                )
            };
            if count >= 0 {
                tokens.truncate(count.cast_unsigned() as usize);
                return Ok(tokens);
            }
            if count == i32::MIN || count.unsigned_abs() as usize <= tokens.len() {
                return Err(failed("it has too many tokens"));
            }
            tokens.resize(count.unsigned_abs() as usize, 0);
        }
    }

    /// The text of a control token as it is written; empty where there is none.
    pub fn text_of(&self, token: Option<Token>) -> String {
        let bytes = token.map(|token| self.piece(token, true)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The tokens of a prompt that a chat template made: control tokens in it count as such.
    ///
    /// # Errors
    /// As [`Model::tokenise`].
    pub fn tokenise_chat(&self, prompt: &str) -> Result<Vec<Token>, EngineError> {
        let tokens = self.tokenise(prompt, false, true)?;
        // Many templates write the beginning token themselves, some leave it to the tokenizer.
        let begins = self.beginning().is_none_or(|token| tokens.first() == Some(&token));
        if begins { Ok(tokens) } else { self.tokenise(prompt, true, true) }
    }

    /// The bytes of one token; a character may be spread over several tokens. Control tokens are
    /// empty unless `special`.
    pub fn piece(&self, token: Token, special: bool) -> Vec<u8> {
        if token < 0 || token.cast_unsigned() >= self.vocabulary() {
            return Vec::new();
        }
        let mut buffer = vec![0_u8; 64];
        loop {
            let capacity = i32::try_from(buffer.len()).unwrap_or(i32::MAX);
            // SAFETY: the buffer is valid for its length, and the token is in the vocabulary.
            let count = unsafe {
                sys::llama_token_to_piece(
                    self.vocab(),
                    token,
                    buffer.as_mut_ptr().cast::<c_char>(),
                    capacity,
                    0,
                    special,
                )
            };
            if count >= 0 {
                buffer.truncate(count.cast_unsigned() as usize);
                return buffer;
            }
            if count.unsigned_abs() as usize <= buffer.len() {
                return Vec::new();
            }
            buffer.resize(count.unsigned_abs() as usize, 0);
        }
    }

    /// The bytes of a sequence of tokens, without the special ones that tokenising added.
    pub fn detokenise(&self, tokens: &[Token], special: bool) -> Vec<u8> {
        let known: Vec<Token> = tokens
            .iter()
            .copied()
            .filter(|token| *token >= 0 && token.cast_unsigned() < self.vocabulary())
            .collect();
        let Ok(count) = i32::try_from(known.len()) else { return Vec::new() };
        let mut buffer = vec![0_u8; known.len() * 8 + 16];
        loop {
            let capacity = i32::try_from(buffer.len()).unwrap_or(i32::MAX);
            // SAFETY: both pointers are valid for the lengths beside them, and all tokens are in
            // the vocabulary.
            let written = unsafe {
                sys::llama_detokenize(
                    self.vocab(),
                    known.as_ptr(),
                    count,
                    buffer.as_mut_ptr().cast::<c_char>(),
                    capacity,
                    !special,
                    special,
                )
            };
            if written >= 0 {
                buffer.truncate(written.cast_unsigned() as usize);
                return buffer;
            }
            if written.unsigned_abs() as usize <= buffer.len() {
                return Vec::new();
            }
            buffer.resize(written.unsigned_abs() as usize, 0);
        }
    }

    /// Whether `token` ends an answer (end of text, end of turn).
    pub fn ends(&self, token: Token) -> bool {
        // SAFETY: the library checks the range of the token.
        unsafe { sys::llama_vocab_is_eog(self.vocab(), token) }
    }

    /// Whether `token` is a control token.
    pub fn is_control(&self, token: Token) -> bool {
        let known = token >= 0 && token.cast_unsigned() < self.vocabulary();
        // SAFETY: the token is in the vocabulary.
        known && unsafe { sys::llama_vocab_is_control(self.vocab(), token) }
    }

    /// The token that begins a text, if the model has one.
    pub fn beginning(&self) -> Option<Token> {
        // SAFETY: the vocabulary lives as long as the model.
        let token = unsafe { sys::llama_vocab_bos(self.vocab()) };
        (token >= 0).then_some(token)
    }

    /// The token that ends a text, if the model has one.
    pub fn end(&self) -> Option<Token> {
        // SAFETY: the vocabulary lives as long as the model.
        let token = unsafe { sys::llama_vocab_eos(self.vocab()) };
        (token >= 0).then_some(token)
    }

    /// Whether tokenising with `add_special` puts the beginning token first.
    pub fn adds_beginning(&self) -> bool {
        // SAFETY: the vocabulary lives as long as the model.
        unsafe { sys::llama_vocab_get_add_bos(self.vocab()) }
    }
}

/// A static or model-owned C string as text; absent for null.
fn text(pointer: *const c_char) -> Option<String> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: the callers pass NUL-terminated strings that live at least for this call.
    Some(unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned())
}

/// Calls `read` (which follows snprintf's convention) with a buffer that is large enough.
fn read_text(read: impl Fn(*mut c_char, usize) -> i32) -> Option<String> {
    let mut buffer = vec![0_u8; 256];
    loop {
        let length = read(buffer.as_mut_ptr().cast::<c_char>(), buffer.len());
        let length = usize::try_from(length).ok()?;
        if length < buffer.len() {
            buffer.truncate(length);
            return Some(String::from_utf8_lossy(&buffer).into_owned());
        }
        if length >= MAX_METADATA_BYTES {
            return None;
        }
        buffer.resize(length + 1, 0);
    }
}
