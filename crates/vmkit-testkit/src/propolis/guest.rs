//! What stands for the guest: it prints on its first serial port, echoes what is typed, and obeys
//! some lines.
//!
//! - `poweroff` and `reboot` do what they say;
//! - `panic` prints the last words of a kernel and does nothing more;
//! - `flood N` prints N bytes, each line of which begins with its offset in the flood.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::future::pending;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

use super::behaviour::PropolisBehaviour;

/// What the guest does to its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GuestEvent {
    Halt,
    Reset,
}

/// What the machine does to its guest.
#[derive(Debug)]
pub(super) enum GuestOrder {
    /// Starts from the beginning.
    Boot,
    /// Ends at once.
    Halt,
    /// Prints something.
    Print(Vec<u8>),
    /// Does something to its machine, once what it has printed has gone out.
    Raise(GuestEvent),
}

/// No line that is obeyed is longer.
const LONGEST_LINE: usize = 256;

/// How long a flood's lines are, in bytes.
const FLOOD_LINE: usize = 64;

/// Runs until the sender of orders is gone.
pub(super) async fn run(
    uart: DuplexStream,
    mut orders: mpsc::UnboundedReceiver<GuestOrder>,
    events: impl Fn(GuestEvent),
    behaviour: PropolisBehaviour,
) {
    let (mut input, mut output) = tokio::io::split(uart);
    let mut guest =
        SimulatedGuest { behaviour, on: false, unsent: VecDeque::new(), line: Vec::new(), last: None };
    let mut typed = [0; 256];
    loop {
        if guest.unsent.is_empty()
            && let Some(event) = guest.last.take()
        {
            events(event);
        }
        tokio::select! {
            biased;
            order = orders.recv() => match order {
                Some(order) => guest.obey(order),
                None => return,
            },
            written = write_some(&mut output, &guest.unsent) => {
                guest.unsent.drain(..written);
            }
            read = input.read(&mut typed), if guest.on && guest.unsent.is_empty() => {
                guest.hear(&typed[..read.unwrap_or_default()]);
            }
        }
    }
}

/// Writes what a port takes, and waits for ever where there is nothing to write.
async fn write_some(output: &mut (impl AsyncWriteExt + Unpin), unsent: &VecDeque<u8>) -> usize {
    match unsent.as_slices().0 {
        [] => pending().await,
        bytes => match output.write(bytes).await {
            Ok(written) if written > 0 => written,
            // The other end is gone, and the order to halt is on its way.
            _ => pending().await,
        },
    }
}

#[derive(Debug)]
struct SimulatedGuest {
    behaviour: PropolisBehaviour,
    on: bool,
    unsent: VecDeque<u8>,
    line: Vec<u8>,
    last: Option<GuestEvent>,
}

impl SimulatedGuest {
    fn obey(&mut self, order: GuestOrder) {
        match order {
            GuestOrder::Boot => {
                *self = Self {
                    on: true,
                    unsent: self.behaviour.console.bytes().collect(),
                    line: Vec::new(),
                    last: None,
                    behaviour: self.behaviour.clone(),
                };
            }
            GuestOrder::Halt => {
                self.on = false;
                self.unsent.clear();
                self.last = None;
            }
            GuestOrder::Print(bytes) => self.unsent.extend(bytes),
            GuestOrder::Raise(event) if self.on => self.last = Some(event),
            GuestOrder::Raise(_) => {}
        }
    }

    fn hear(&mut self, typed: &[u8]) {
        for &byte in typed {
            let end = matches!(byte, b'\r' | b'\n');
            if self.behaviour.echo {
                match end {
                    true => self.unsent.extend(b"\r\n"),
                    false => self.unsent.push_back(byte),
                }
            }
            if end {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
                self.run_line(&line);
            } else if self.line.len() < LONGEST_LINE {
                self.line.push(byte);
            }
        }
    }

    fn run_line(&mut self, line: &str) {
        match line.trim() {
            "poweroff" => {
                self.unsent.extend(b"reboot: Power down\r\n");
                self.last = Some(GuestEvent::Halt);
            }
            "reboot" => {
                self.unsent.extend(b"reboot: Restarting system\r\n");
                self.last = Some(GuestEvent::Reset);
            }
            "panic" => {
                self.unsent.extend(b"Kernel panic - not syncing: asked for\r\n");
                self.on = false;
            }
            other => {
                if let Some(bytes) = other.strip_prefix("flood ").and_then(|bytes| bytes.parse().ok()) {
                    self.unsent.extend(flood(bytes));
                }
            }
        }
    }
}

/// Returns so many bytes of lines, each of which begins with its own offset.
pub(super) fn flood(bytes: usize) -> Vec<u8> {
    let mut text = String::with_capacity(bytes + FLOOD_LINE);
    while text.len() < bytes {
        let offset = text.len();
        writeln!(text, "{offset:<width$}", width = FLOOD_LINE - 1).expect("a string takes all");
    }
    text.truncate(bytes);
    text.into_bytes()
}
