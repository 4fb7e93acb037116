//! Which container is asked about when: some at a time, those that start before those that ran when the agent came, and
//! again until somebody knows them.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};

use super::{Identity, Sources};

/// Waits between attempts: quick at first, since a container's entrypoint is near, then patient.
const FIRST_WAIT: Duration = Duration::from_millis(5);
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// Questions at a time. One takes much more memory than its wait.
const AT_ONCE: usize = 64;

/// What is to be found out.
pub struct Questions(mpsc::UnboundedSender<Order>);

enum Order {
    Ask { slot: u64, id: String, first: Duration },
    Forget(u64),
}

impl Questions {
    /// Answers go to `found`, until nobody listens.
    pub fn new(sources: Arc<Sources>, found: mpsc::Sender<(u64, Identity)>) -> Self {
        let (orders, taken) = mpsc::unbounded_channel();
        tokio::spawn(Asking::new(sources, found).work(taken));
        Self(orders)
    }

    /// Asks what the container `id` is, after `first` and then until somebody knows it.
    pub fn ask(&self, slot: u64, id: String, first: Duration) {
        let _ends_with_the_agent = self.0.send(Order::Ask { slot, id, first });
    }

    /// Asks no more.
    pub fn forget(&self, slot: u64) {
        let _as_above = self.0.send(Order::Forget(slot));
    }
}

/// A question without an answer.
struct Open {
    id: String,
    /// Before the next attempt.
    wait: Duration,
    attempt: Option<AbortHandle>,
}

/// The outcome of an attempt; the complaint when nobody knew the container.
type Outcome = (u64, Result<(), String>);

struct Asking {
    sources: Arc<Sources>,
    found: mpsc::Sender<(u64, Identity)>,
    open: HashMap<u64, Open>,
    /// Who is asked about next, the last first. Some may have been answered or forgotten.
    ready: VecDeque<u64>,
    later: BTreeSet<(Instant, u64)>,
    asked: JoinSet<Outcome>,
}

impl Asking {
    fn new(sources: Arc<Sources>, found: mpsc::Sender<(u64, Identity)>) -> Self {
        Self {
            sources,
            found,
            open: HashMap::new(),
            ready: VecDeque::new(),
            later: BTreeSet::new(),
            asked: JoinSet::new(),
        }
    }

    async fn work(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            self.ask();
            let next = self.later.first().map(|(due, _)| *due);
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Order::Ask { slot, id, first }) => self.take(slot, id, first),
                    Some(Order::Forget(slot)) => self.forget(slot),
                    None => return,
                },
                // One that was forgotten has no outcome.
                Some(ended) = self.asked.join_next() => if let Ok((slot, outcome)) = ended {
                    self.ended(slot, outcome);
                },
                () = async { sleep_until(next.unwrap_or_else(Instant::now)).await }, if next.is_some() => self.wake(),
            }
        }
    }

    fn take(&mut self, slot: u64, id: String, first: Duration) {
        self.forget(slot);
        self.open.insert(slot, Open { id, wait: FIRST_WAIT, attempt: None });
        if first.is_zero() {
            self.ready.push_back(slot);
        } else {
            self.later.insert((Instant::now() + first, slot));
        }
    }

    fn forget(&mut self, slot: u64) {
        if let Some(Open { attempt: Some(attempt), .. }) = self.open.remove(&slot) {
            attempt.abort();
        }
    }

    /// Begins as many attempts as there is room for.
    fn ask(&mut self) {
        while self.asked.len() < AT_ONCE {
            let Some(slot) = self.ready.pop_back() else { return };
            let Some(open) = self.open.get_mut(&slot).filter(|open| open.attempt.is_none()) else { continue };
            let (sources, found, id) = (Arc::clone(&self.sources), self.found.clone(), open.id.clone());
            open.attempt = Some(self.asked.spawn(async move {
                let mut said = "nobody knows such a container".to_owned();
                match sources.ask(&id, &mut said).await {
                    Some(identity) => {
                        let _agent_stops = found.send((slot, identity)).await;
                        (slot, Ok(()))
                    }
                    None => (slot, Err(said)),
                }
            }));
        }
    }

    fn ended(&mut self, slot: u64, outcome: Result<(), String>) {
        let Err(said) = outcome else {
            self.open.remove(&slot);
            return;
        };
        let Some(open) = self.open.get_mut(&slot) else { return };
        open.attempt = None;
        self.later.insert((Instant::now() + open.wait, slot));
        if open.wait < LONGEST_WAIT && open.wait * 2 >= LONGEST_WAIT {
            tracing::warn!(container = open.id, error = said, "no runtime says what this is; asking on");
        }
        open.wait = (open.wait * 2).min(LONGEST_WAIT);
    }

    /// Takes those whose time has come. Whom nobody has known for long does not come before the others.
    fn wake(&mut self) {
        let now = Instant::now();
        while let Some((due, slot)) = self.later.first().copied() {
            if due > now {
                return;
            }
            self.later.pop_first();
            match self.open.get(&slot) {
                Some(open) if open.wait < LONGEST_WAIT => self.ready.push_back(slot),
                Some(_) => self.ready.push_front(slot),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Runtimes;

    /// Nobody is there to be asked.
    fn asking() -> Asking {
        let none = Vec::new;
        let runtimes =
            Runtimes { nri: none(), cri: none(), containerd: none(), docker: none(), storage: none() };
        Asking::new(Arc::new(Sources::new(&runtimes)), mpsc::channel(1).0)
    }

    fn is_asked_about(asking: &Asking, slot: u64) -> bool {
        asking.open[&slot].attempt.is_some()
    }

    async fn one_ends(asking: &mut Asking) {
        let (slot, outcome) = asking.asked.join_next().await.unwrap().unwrap();
        assert!(outcome.is_err());
        asking.ended(slot, outcome);
    }

    #[tokio::test]
    async fn who_starts_comes_before_those_that_were_there() {
        let mut asking = asking();
        for slot in 0..1000 {
            asking.take(slot, slot.to_string(), Duration::ZERO);
        }
        asking.ask();
        assert_eq!(asking.asked.len(), AT_ONCE);
        assert!(!is_asked_about(&asking, 0));
        asking.take(1000, "new".to_owned(), Duration::ZERO);
        one_ends(&mut asking).await;
        asking.ask();
        assert!(is_asked_about(&asking, 1000));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_unknown_for_long_waits_behind_the_others() {
        let mut asking = asking();
        asking.take(1, "unknown".to_owned(), Duration::ZERO);
        while asking.open[&1].wait < LONGEST_WAIT {
            asking.ask();
            one_ends(&mut asking).await;
            tokio::time::advance(LONGEST_WAIT).await;
            asking.wake();
        }
        asking.ask();
        one_ends(&mut asking).await;
        asking.take(2, "other".to_owned(), Duration::ZERO);
        tokio::time::advance(LONGEST_WAIT).await;
        asking.wake();
        assert_eq!(asking.ready, [1, 2]);
        asking.forget(2);
        asking.ask();
        assert!(is_asked_about(&asking, 1));
        assert!(!asking.open.contains_key(&2));
    }
}
