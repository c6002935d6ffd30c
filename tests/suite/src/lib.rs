//! The skeleton of a suite that runs inside the disposable node: what a case is, which cases are
//! asked for, how they run one after another, and where their results go.
//!
//! What the cases judge, and what they share, is each suite's own (`brig-e2e`, `brig-cri`).

pub mod case;
pub mod lock;
pub mod options;
pub mod results;
pub mod run;
