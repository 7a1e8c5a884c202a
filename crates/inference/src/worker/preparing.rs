//! Compiling what answers are held to, on a thread of its own: neither the engine nor the reader of
//! commands waits for it.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::process::{Order, applied, emit, generating};
use super::protocol::{Event, GenerateRequest, RequestError};
use super::scheduler::{Task, Work};
use crate::constraint::{COMPILE_STACK_BYTES, Compiler, Guide};
use crate::llama::{Model, Token};

/// The thread, and what waits for it.
pub(super) struct Preparing {
    orders: Sender<Waiting>,
    /// Requests that were not cancelled yet.
    waiting: Arc<Mutex<HashSet<u64>>>,
}

/// A request whose constraint is to be compiled.
struct Waiting {
    id: u64,
    request: GenerateRequest,
    tokens: Vec<Token>,
    arrived: Instant,
}

impl Preparing {
    pub(super) fn new(model: Arc<Model>, engine: Sender<Order>) -> Self {
        let (orders, received) = channel();
        let waiting = Arc::<Mutex<HashSet<u64>>>::default();
        let known = Arc::clone(&waiting);
        std::thread::Builder::new()
            .name("constraints".to_owned())
            .stack_size(COMPILE_STACK_BYTES)
            .spawn(move || prepare(&model, &received, &known, &engine))
            .expect("a thread can be started");
        Self { orders, waiting }
    }

    /// Takes a request that has a constraint.
    pub(super) fn begin(
        &self,
        id: u64,
        request: GenerateRequest,
        tokens: Vec<Token>,
        arrived: Instant,
    ) {
        self.waiting.lock().expect("no holder panics").insert(id);
        let _ = self.orders.send(Waiting { id, request, tokens, arrived });
    }

    /// Forgets a request, if it is here.
    pub(super) fn cancel(&self, id: u64) {
        self.waiting.lock().expect("no holder panics").remove(&id);
    }
}

fn prepare(
    model: &Model,
    received: &Receiver<Waiting>,
    waiting: &Mutex<HashSet<u64>>,
    engine: &Sender<Order>,
) {
    // Made for the first constraint: the vocabulary as a tree takes memory that others need not pay.
    let mut compiler = None;
    for Waiting { id, request, tokens, arrived } in received {
        if !waiting.lock().expect("no holder panics").contains(&id) {
            continue;
        }
        let guide = guide(&request, &mut compiler, model);
        // While this is held, a cancellation comes either before or after both.
        let mut waiting = waiting.lock().expect("no holder panics");
        if !waiting.remove(&id) {
            continue;
        }
        match guide {
            Ok(guide) => {
                let adapters = applied(&request);
                let generating = generating(request, Some(guide), &tokens, model);
                let work = Work::Generate(Box::new(generating));
                let _ = engine.send(Order::Submit(Task { id, tokens, work, adapters, arrived }));
            }
            Err(error) => emit(&Event::Failed { id, error }),
        }
    }
}

fn guide(
    request: &GenerateRequest,
    compiler: &mut Option<Compiler>,
    model: &Model,
) -> Result<Guide, RequestError> {
    let constraint = request.constraint.as_ref().expect("only those that have one come here");
    let compiler = match compiler {
        Some(compiler) => compiler,
        None => compiler
            .insert(Compiler::of(model).map_err(|message| RequestError::Engine { message })?),
    };
    let guide = compiler.guide(constraint).and_then(|mut guide| {
        // Whether the vocabulary can begin at all is known before the prompt is computed.
        guide.mask()?;
        Ok(guide)
    });
    guide.map_err(|message| RequestError::Invalid {
        parameter: constraint.parameter.clone(),
        message,
    })
}
