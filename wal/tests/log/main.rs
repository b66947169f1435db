//! The log as its users see it: what is acknowledged is there, what is cut stays away, and damage
//! is told from a torn tail.

mod basics;
mod crash;
mod support;
