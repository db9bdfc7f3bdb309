//! Work on many machines: each in its turn, and side by side where nothing orders them.

use std::collections::BTreeSet;

use tokio::task::JoinSet;

/// How the work on one machine ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum JobEnd<T> {
    /// It was done, with this outcome.
    Done(T),
    /// It was not begun, since that on the machine at `because` did not end well.
    Skipped {
        /// The place of that machine.
        because: usize,
    },
}

/// Does the work of `begin` at every place; `after[place]` names the places that have to come
/// first.
///
/// At most `at_once` are worked on at the same time. Where the outcome of one does not `let_on`,
/// whatever comes after it is skipped, and so is what comes after that. The answer has the order of
/// the places.
///
/// # Cancel safety
/// When this is dropped, so is the work that was begun.
///
/// # Panics
/// When the places wait for each other in a circle; a project has none. A panic in the work goes on
/// here.
pub(super) async fn in_order<T, F>(
    after: &[Vec<usize>],
    at_once: usize,
    lets_on: impl Fn(&T) -> bool,
    begin: impl Fn(usize) -> F,
) -> Vec<JobEnd<T>>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let mut ended: Vec<Option<JobEnd<T>>> = Vec::new();
    ended.resize_with(after.len(), || None);
    let mut waiting: BTreeSet<usize> = (0..after.len()).collect();
    let mut begun = JoinSet::new();
    loop {
        loop {
            let is_done = |place: &usize| matches!(&ended[*place], Some(JobEnd::Done(end)) if lets_on(end));
            let bad = |place: &usize| ended[*place].is_some() && !is_done(place);
            let skipped = waiting
                .iter()
                .find_map(|place| after[*place].iter().copied().find(bad).map(|because| (*place, because)));
            if let Some((place, because)) = skipped {
                waiting.remove(&place);
                ended[place] = Some(JobEnd::Skipped { because });
                continue;
            }
            let next = waiting.iter().copied().find(|place| after[*place].iter().all(&is_done));
            match next {
                Some(place) if begun.len() < at_once.max(1) => {
                    waiting.remove(&place);
                    let work = begin(place);
                    begun.spawn(async move { (place, work.await) });
                }
                _ => break,
            }
        }
        match begun.join_next().await {
            Some(Ok((place, end))) => ended[place] = Some(JobEnd::Done(end)),
            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            None => break,
        }
    }
    ended
        .into_iter()
        .map(|ended| ended.expect("a project has no circle, so every machine has its turn"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::sync::Barrier;
    use tokio::task::yield_now;

    /// A chain 0 → 1 → 2, and 3 by itself.
    fn chain() -> Vec<Vec<usize>> {
        vec![vec![], vec![0], vec![1], vec![]]
    }

    #[tokio::test]
    async fn each_comes_after_those_it_waits_for() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let after = vec![vec![2], vec![0], vec![]];
        in_order(
            &after,
            8,
            |()| true,
            |place| {
                let seen = Arc::clone(&seen);
                async move {
                    seen.lock().unwrap().push(("begin", place));
                    yield_now().await;
                    seen.lock().unwrap().push(("end", place));
                }
            },
        )
        .await;
        let steps = [("begin", 2), ("end", 2), ("begin", 0), ("end", 0), ("begin", 1), ("end", 1)];
        assert_eq!(*seen.lock().unwrap(), steps);
    }

    #[tokio::test]
    async fn what_nothing_orders_goes_side_by_side() {
        let barrier = Arc::new(Barrier::new(3));
        let work = |_| {
            let barrier = Arc::clone(&barrier);
            // None continues before all three are there.
            async move { barrier.wait().await.is_leader() }
        };
        assert_eq!(in_order(&vec![vec![]; 3], 3, |_| true, work).await.len(), 3);
    }

    #[tokio::test]
    async fn no_more_are_worked_on_than_allowed() {
        let now = Arc::new(Mutex::new((0, 0)));
        in_order(
            &vec![vec![]; 9],
            2,
            |()| true,
            |_| {
                let now = Arc::clone(&now);
                async move {
                    {
                        let mut now = now.lock().unwrap();
                        now.0 += 1;
                        now.1 = now.0.max(now.1);
                    }
                    yield_now().await;
                    now.lock().unwrap().0 -= 1;
                }
            },
        )
        .await;
        assert_eq!(now.lock().unwrap().1, 2);
    }

    #[tokio::test]
    async fn a_failure_skips_what_comes_after_and_nothing_else() {
        let ended = in_order(&chain(), 8, |ok: &bool| *ok, |place| async move { place != 0 }).await;
        let skipped = |because| JobEnd::Skipped { because };
        assert_eq!(ended, [JobEnd::Done(false), skipped(0), skipped(1), JobEnd::Done(true)]);
    }
}
