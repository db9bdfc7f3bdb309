//! Which requests to change an instance's state are taken, dropped, or denied.
//!
//! Pure: no clock, no tasks; the machine asks and tells.
//!
//! Source: the request queue of propolis-server. What is asked and not yet done counts as well as
//! what is: after a `Stop` was queued nothing else is taken, though the instance still runs.

use super::wire::InstanceStateRequested as Request;

/// What happens to one kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disposition {
    Enqueue,
    /// It is done, or will be: the request succeeds and has no effect.
    Ignore,
    Deny(RequestDenied),
}

/// Why a request is denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestDenied {
    NotActive,
    StartInProgress,
    HaltPending,
    Halted,
    Failed,
}

impl RequestDenied {
    /// Returns the server's own words.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::NotActive => "Operation requires an active instance",
            Self::StartInProgress => "Instance is currently starting",
            Self::HaltPending => "Instance is preparing to stop",
            Self::Halted => "Instance has already halted",
            Self::Failed => "Instance failed to start or halted due to a failure",
        }
    }
}

/// What the instance has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InstanceChange {
    Running,
    Rebooted,
    Stopped,
    Failed,
}

/// The rules of one instance as they are now.
#[derive(Debug)]
pub(super) struct RequestQueue {
    run: Disposition,
    reboot: Disposition,
    stop: Disposition,
}

impl RequestQueue {
    /// Returns the rules of an instance that was just created.
    pub(super) fn new() -> Self {
        Self {
            run: Disposition::Enqueue,
            reboot: Disposition::Deny(RequestDenied::NotActive),
            stop: Disposition::Enqueue,
        }
    }

    /// Returns whether the request is to be done; if not, it is as good as done.
    ///
    /// # Errors
    /// Says why it is denied.
    pub(super) fn ask(&mut self, request: Request) -> Result<bool, RequestDenied> {
        let disposition = match request {
            Request::Run => self.run,
            Request::Reboot => self.reboot,
            Request::Stop => self.stop,
        };
        match disposition {
            Disposition::Deny(denied) => return Err(denied),
            Disposition::Ignore => return Ok(false),
            Disposition::Enqueue => {}
        }
        match request {
            Request::Run => {
                self.run = Disposition::Ignore;
                self.reboot = Disposition::Deny(RequestDenied::StartInProgress);
            }
            Request::Reboot => self.reboot = Disposition::Ignore,
            Request::Stop => self.forbid_all_but_stop(RequestDenied::HaltPending),
        }
        Ok(true)
    }

    /// Takes note of what the instance has come to.
    pub(super) fn tell(&mut self, change: InstanceChange) {
        match change {
            // A `Stop` that was queued meanwhile still forbids it.
            InstanceChange::Running if self.reboot == Disposition::Deny(RequestDenied::StartInProgress) => {
                self.reboot = Disposition::Enqueue;
            }
            InstanceChange::Running => {}
            InstanceChange::Rebooted if self.reboot == Disposition::Ignore => {
                self.reboot = Disposition::Enqueue
            }
            InstanceChange::Rebooted => {}
            InstanceChange::Stopped => self.forbid_all_but_stop(RequestDenied::Halted),
            InstanceChange::Failed => {
                self.run = Disposition::Deny(RequestDenied::Failed);
                self.reboot = Disposition::Deny(RequestDenied::Failed);
            }
        }
    }

    fn forbid_all_but_stop(&mut self, why: RequestDenied) {
        self.run = Disposition::Deny(why);
        self.reboot = Disposition::Deny(why);
        self.stop = Disposition::Ignore;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> RequestQueue {
        let mut queue = RequestQueue::new();
        assert_eq!(queue.ask(Request::Run), Ok(true));
        queue.tell(InstanceChange::Running);
        queue
    }

    #[test]
    fn a_created_instance_can_be_started_and_stopped_but_not_rebooted() {
        assert_eq!(RequestQueue::new().ask(Request::Run), Ok(true));
        assert_eq!(RequestQueue::new().ask(Request::Stop), Ok(true));
        assert_eq!(RequestQueue::new().ask(Request::Reboot), Err(RequestDenied::NotActive));
    }

    #[test]
    fn a_second_start_is_taken_and_does_nothing() {
        let mut queue = RequestQueue::new();
        assert_eq!(queue.ask(Request::Run), Ok(true));
        assert_eq!(queue.ask(Request::Run), Ok(false));
        assert_eq!(running().ask(Request::Run), Ok(false));
    }

    #[test]
    fn no_reboot_is_taken_while_a_start_is_queued() {
        let mut queue = RequestQueue::new();
        assert_eq!(queue.ask(Request::Run), Ok(true));
        assert_eq!(queue.ask(Request::Reboot), Err(RequestDenied::StartInProgress));
    }

    #[test]
    fn reboots_are_done_once_at_a_time() {
        let mut queue = running();
        assert_eq!(queue.ask(Request::Reboot), Ok(true));
        assert_eq!(queue.ask(Request::Reboot), Ok(false));
        queue.tell(InstanceChange::Rebooted);
        assert_eq!(queue.ask(Request::Reboot), Ok(true));
    }

    #[test]
    fn after_a_stop_was_queued_only_a_stop_is_taken() {
        let mut queue = running();
        assert_eq!(queue.ask(Request::Reboot), Ok(true));
        assert_eq!(queue.ask(Request::Stop), Ok(true));
        queue.tell(InstanceChange::Rebooted);
        assert_eq!(queue.ask(Request::Stop), Ok(false));
        assert_eq!(queue.ask(Request::Run), Err(RequestDenied::HaltPending));
        assert_eq!(queue.ask(Request::Reboot), Err(RequestDenied::HaltPending));
        queue.tell(InstanceChange::Stopped);
        assert_eq!(queue.ask(Request::Run), Err(RequestDenied::Halted));
        assert_eq!(queue.ask(Request::Reboot), Err(RequestDenied::Halted));
    }

    #[test]
    fn a_start_that_succeeds_forgets_no_stop_that_was_queued_behind_it() {
        let mut queue = RequestQueue::new();
        assert_eq!(queue.ask(Request::Run), Ok(true));
        assert_eq!(queue.ask(Request::Stop), Ok(true));
        queue.tell(InstanceChange::Running);
        assert_eq!(queue.ask(Request::Reboot), Err(RequestDenied::HaltPending));
        assert_eq!(queue.ask(Request::Run), Err(RequestDenied::HaltPending));
    }

    #[test]
    fn a_failed_instance_can_be_stopped() {
        let mut queue = RequestQueue::new();
        assert_eq!(queue.ask(Request::Run), Ok(true));
        queue.tell(InstanceChange::Failed);
        assert_eq!(queue.ask(Request::Run), Err(RequestDenied::Failed));
        assert_eq!(queue.ask(Request::Reboot), Err(RequestDenied::Failed));
        assert_eq!(queue.ask(Request::Stop), Ok(true));
    }
}
