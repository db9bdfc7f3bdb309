//! What a program that has vmkit in it sees of the operations in its `tracing`.
//!
//! A binary of its own: a span that another test's thread meets first, without a subscriber, may be
//! switched off for all.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    dead_code,
    unused_imports,
    reason = "a test may panic; what it shares with others has more than it uses"
)]

#[path = "../it/common.rs"]
mod common;
#[cfg(all(feature = "images", feature = "ssh", feature = "vmfile"))]
#[path = "../it/shop.rs"]
mod shop;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{spec, web};
use tokio::runtime::Builder;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use tracing_core::span::Current;
use vmkit::spec::VmSpecBuilder;
use vmkit::store::Home;
use vmkit::{NoopHypervisor, VmManager};

/// A span as it was seen.
#[derive(Debug, Clone)]
struct Seen {
    name: &'static str,
    target: &'static str,
    /// The span that it is in.
    inside: Option<u64>,
    fields: BTreeMap<&'static str, String>,
    metadata: &'static Metadata<'static>,
}

impl Seen {
    fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

/// Sees all spans of one thread; its numbers begin with 1.
#[derive(Debug, Clone, Default)]
struct Listener(Arc<Mutex<(Vec<Seen>, Vec<u64>)>>);

impl Listener {
    fn seen(&self) -> Vec<Seen> {
        self.0.lock().unwrap().0.clone()
    }

    /// Returns the names of the spans that were seen.
    fn names(&self) -> Vec<&'static str> {
        self.seen().iter().map(|seen| seen.name).collect()
    }
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span()
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut now = self.0.lock().unwrap();
        let metadata = span.metadata();
        let (name, target, inside) = (metadata.name(), metadata.target(), now.1.last().copied());
        let mut seen = Seen { name, target, inside, fields: BTreeMap::new(), metadata };
        span.record(&mut seen);
        now.0.push(seen);
        Id::from_u64(now.0.len() as u64)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        let place = usize::try_from(span.into_u64()).unwrap() - 1;
        values.record(&mut self.0.lock().unwrap().0[place]);
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, span: &Id) {
        self.0.lock().unwrap().1.push(span.into_u64());
    }

    fn exit(&self, _: &Id) {
        self.0.lock().unwrap().1.pop();
    }

    fn current_span(&self) -> Current {
        let now = self.0.lock().unwrap();
        match now.1.last() {
            Some(&id) => Current::new(Id::from_u64(id), now.0[usize::try_from(id).unwrap() - 1].metadata),
            None => Current::none(),
        }
    }
}

/// Does something on one thread, and returns what was seen of it.
fn listening<T>(work: impl Future<Output = T>) -> (T, Listener) {
    let listener = Listener::default();
    let done = tracing::subscriber::with_default(listener.clone(), || {
        Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    });
    (done, listener)
}

fn manager(temp: &tempfile::TempDir) -> VmManager<NoopHypervisor> {
    VmManager::new(NoopHypervisor::new(), Home::at(temp.path()).unwrap())
}

#[test]
fn each_operation_is_a_span_with_its_vm_and_how_it_ended() {
    let temp = tempfile::tempdir().unwrap();
    let manager = manager(&temp);
    let (id, listener) = listening(async {
        let id = manager.create(spec()).await.unwrap().id;
        manager.start(&web()).await.unwrap();
        manager.suspend(&web()).await.unwrap();
        manager.resume(&web()).await.unwrap();
        manager.restart(&web(), Duration::ZERO).await.unwrap();
        manager.add_forward(&web(), &"8080:80".parse().unwrap()).await.unwrap();
        manager.remove_forward(&web(), &"8080:80".parse().unwrap()).await.unwrap();
        manager.rerun_cloud_init(&web()).await.unwrap();
        manager.reconfigure_with(&web(), |spec| VmSpecBuilder::from(spec).cpus(2).build()).await.unwrap();
        manager.stop(&web(), Duration::ZERO).await.unwrap();
        manager.remove(&web(), false).await.unwrap();
        id.to_string()
    });
    let expected = [
        "create",
        "start",
        "suspend",
        "resume",
        "restart",
        "add_forward",
        "remove_forward",
        "rerun_cloud_init",
        "reconfigure",
        "stop",
        "remove",
    ];
    assert_eq!(listener.names(), expected);
    for seen in listener.seen() {
        let fields = [seen.target, seen.field("vm"), seen.field("id"), seen.field("outcome")];
        assert_eq!(fields, ["vmkit::operation", web().as_str(), &id, "done"], "{}", seen.name);
    }
}

#[test]
fn a_failure_is_classified_by_its_kind_alone() {
    let temp = tempfile::tempdir().unwrap();
    let manager = manager(&temp);
    let ((), listener) = listening(async {
        manager.start(&web()).await.unwrap_err();
        manager.create(spec()).await.unwrap();
        manager.suspend(&web()).await.unwrap_err();
        manager.create(spec()).await.unwrap_err();
    });
    let ends: Vec<(&str, String)> =
        listener.seen().iter().map(|seen| (seen.name, seen.field("outcome").to_owned())).collect();
    let expected =
        [("start", "NotFound"), ("create", "done"), ("suspend", "InvalidState"), ("create", "AlreadyExists")];
    assert_eq!(ends, expected.map(|(name, outcome)| (name, outcome.to_owned())));
    assert_eq!(listener.seen()[0].field("id"), "", "there is no VM");
}

#[test]
fn an_operation_is_in_the_span_of_its_caller_whose_fields_are_let_alone() {
    let temp = tempfile::tempdir().unwrap();
    let manager = manager(&temp);
    let ((), listener) = listening(async {
        let job = tracing::info_span!("job", id = "mine", outcome = tracing::field::Empty);
        tracing::Instrument::instrument(async { manager.create(spec()).await.map(drop) }, job).await.unwrap();
    });
    let [job, create] = &listener.seen()[..] else { panic!("{listener:?}") };
    assert_eq!((job.field("id"), job.field("outcome"), create.inside), ("mine", "", Some(1)));
}

#[cfg(all(feature = "images", feature = "ssh", feature = "vmfile"))]
#[test]
fn machines_launches_and_pulls_are_spans_and_no_address_is_shown() {
    use crate::shop::Shop;
    use tokio::sync::watch;
    use vmkit::image::{Catalogue, ImageStore};
    use vmkit::launch::{LaunchOptions, launch};
    use vmkit::spec::Arch;

    let temp = tempfile::tempdir().unwrap();
    let shop = Shop::at(temp.path());
    let manager = shop.engine.manager();
    let text = "version = 1\n[project]\nname = 'one'\n[machine.web]\nkernel = 'vmlinuz'\n";
    let (project, options) = (shop.project(text), Default::default());
    let images = ImageStore::new(manager.home(), Catalogue::built_in());
    let ((), listener) = listening(async {
        let report = shop.engine.up(&project, &options, shop.listener()).await.unwrap();
        assert!(report.is_fine(), "{report:?}");
        let progress = watch::Sender::default();
        let url = "http://127.0.0.1:1/disk.raw?token=geheim".parse().unwrap();
        images.pull(&url, Arch::X86_64, &progress).await.unwrap_err();
        images.pull(&"no-such-image:1".parse().unwrap(), Arch::X86_64, &progress).await.unwrap_err();
        let none = LaunchOptions::of_image(&"/nowhere/disk.raw".parse().unwrap()).unwrap();
        assert!(launch(manager, &images, none, &mut |_| {}).await.is_err());
    });
    assert_eq!(listener.names(), ["up", "create", "start", "pull", "pull", "launch"]);
    let seen = listener.seen();
    let up = ["machine", "vm", "outcome"].map(|field| seen[0].field(field));
    assert_eq!((up, seen[0].field("id")), (["web", "one-web", "done"], seen[1].field("id")));
    assert_eq!((seen[1].inside, seen[2].inside), (Some(1), Some(1)));
    assert_eq!((seen[3].field("image"), seen[4].field("image")), ("", "no-such-image:1"));
    assert_eq!((seen[4].field("outcome"), seen[5].field("outcome")), ("InvalidInput", "InvalidInput"));
    assert!(!format!("{seen:?}").contains("geheim"));
}
