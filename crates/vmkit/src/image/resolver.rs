//! The addresses of servers, by the system's resolver on a thread of vmkit's own: the HTTP client's
//! uses Tokio's blocking threads, which panic where there can be none.

use std::error::Error as StdError;
use std::net::ToSocketAddrs;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::blocking::blocking;
use crate::error::Error;

/// getaddrinfo(3).
#[derive(Debug)]
pub(super) struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            // The client puts the port of the URL in the place of 0.
            let found = blocking(move || (name.as_str(), 0).to_socket_addrs()).await??;
            Ok(Box::new(found) as Addrs)
        })
    }
}

/// Returns what the host lacked for a request, if that is why it failed.
pub(super) fn refusal(failed: &reqwest::Error) -> Option<Error> {
    let mut cause = failed.source();
    while let Some(error) = cause {
        if let Some(Error::Host { needed, problem, .. }) = error.downcast_ref() {
            return Some(Error::host(needed.clone(), problem.clone()));
        }
        cause = error.source();
    }
    None
}
