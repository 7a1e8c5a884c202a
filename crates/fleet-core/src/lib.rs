//! The fleet's decisions: classes, variant fit, blueprints and rollouts.
//! It has no clock, file, socket, thread or randomness: all of that is passed in.
//! Start reading at [`rollout::plan`].
#![forbid(unsafe_code)]

pub mod blueprint;
pub mod class;
pub mod deltas;
pub mod fit;
pub mod gate;
pub mod labels;
pub mod rollout;
pub mod room;
pub mod survey;
#[cfg(test)]
mod testing;
pub mod words;
pub mod world;
