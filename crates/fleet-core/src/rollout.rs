//! Rollouts as a pure function of what is known.
