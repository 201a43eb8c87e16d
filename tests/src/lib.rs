//! What Runnel's behaviour tests, benches and demo stand on.

pub mod lab;
