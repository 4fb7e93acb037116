//! Which container is asked about when: some at a time, those that start before those that ran when they were found, and
//! again until somebody knows them.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::mpsc,
    task::{AbortHandle, Id, JoinError, JoinSet},
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
    Ask { slot: u64, id: String, first: Duration, starts: bool },
    Forget(u64),
}

impl Questions {
    /// Answers go to `found`, until nobody listens.
    pub fn new(sources: Arc<Sources>, found: mpsc::Sender<(u64, Identity)>) -> Self {
        let (orders, taken) = mpsc::unbounded_channel();
        tokio::spawn(Asking::new(sources, found).work(taken));
        Self(orders)
    }

    /// Asks what the container `id` is, after `first` and then until somebody knows it. One that `starts` comes before those that
    /// ran when they were found.
    pub fn ask(&self, slot: u64, id: String, first: Duration, starts: bool) {
        let _ends_with_the_agent = self.0.send(Order::Ask { slot, id, first, starts });
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
    starts: bool,
    attempt: Option<AbortHandle>,
}

/// The outcome of an attempt; the complaint when nobody knew the container.
type Outcome = Result<(), String>;

struct Asking {
    sources: Arc<Sources>,
    found: mpsc::Sender<(u64, Identity)>,
    open: HashMap<u64, Open>,
    /// Who is asked about next: those that start, then the others. Some may have been answered or forgotten.
    starting: VecDeque<u64>,
    others: VecDeque<u64>,
    later: BTreeSet<(Instant, u64)>,
    asked: JoinSet<Outcome>,
    slots: HashMap<Id, u64>,
}

impl Asking {
    fn new(sources: Arc<Sources>, found: mpsc::Sender<(u64, Identity)>) -> Self {
        Self {
            sources,
            found,
            open: HashMap::new(),
            starting: VecDeque::new(),
            others: VecDeque::new(),
            later: BTreeSet::new(),
            asked: JoinSet::new(),
            slots: HashMap::new(),
        }
    }

    async fn work(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            self.ask();
            let next = self.later.first().map(|(due, _)| *due);
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Order::Ask { slot, id, first, starts }) => self.take(slot, id, first, starts),
                    Some(Order::Forget(slot)) => self.forget(slot),
                    None => return,
                },
                Some(ended) = self.asked.join_next_with_id() => self.ended(ended),
                () = async { sleep_until(next.unwrap_or_else(Instant::now)).await }, if next.is_some() => self.wake(),
            }
        }
    }

    fn take(&mut self, slot: u64, id: String, first: Duration, starts: bool) {
        self.forget(slot);
        self.open.insert(slot, Open { id, wait: FIRST_WAIT, starts, attempt: None });
        if first.is_zero() {
            self.queue(slot, starts);
        } else {
            self.later.insert((Instant::now() + first, slot));
        }
    }

    fn queue(&mut self, slot: u64, starts: bool) {
        if starts { &mut self.starting } else { &mut self.others }.push_back(slot);
    }

    fn forget(&mut self, slot: u64) {
        if let Some(Open { attempt: Some(attempt), .. }) = self.open.remove(&slot) {
            attempt.abort();
        }
    }

    /// Begins as many attempts as there is room for.
    fn ask(&mut self) {
        while self.asked.len() < AT_ONCE {
            let Some(slot) = self.starting.pop_front().or_else(|| self.others.pop_front()) else { return };
            let Some(open) = self.open.get_mut(&slot).filter(|open| open.attempt.is_none()) else { continue };
            let (sources, found, id) = (Arc::clone(&self.sources), self.found.clone(), open.id.clone());
            let attempt = self.asked.spawn(async move {
                let mut said = "nobody knows such a container".to_owned();
                match sources.ask(&id, &mut said).await {
                    Some(identity) => {
                        let _agent_stops = found.send((slot, identity)).await;
                        Ok(())
                    }
                    None => Err(said),
                }
            });
            self.slots.insert(attempt.id(), slot);
            open.attempt = Some(attempt);
        }
    }

    fn ended(&mut self, ended: Result<(Id, Outcome), JoinError>) {
        let (attempt, outcome) = match ended {
            Ok(ended) => ended,
            Err(error) => (error.id(), Err(error.to_string())),
        };
        let Some(slot) = self.slots.remove(&attempt) else { return };
        // It may have been forgotten, and asked about anew.
        let is_current =
            |open: &&mut Open| open.attempt.as_ref().is_some_and(|current| current.id() == attempt);
        let Some(open) = self.open.get_mut(&slot).filter(is_current) else { return };
        open.attempt = None;
        let Err(said) = outcome else {
            self.open.remove(&slot);
            return;
        };
        self.later.insert((Instant::now() + open.wait, slot));
        if open.wait < LONGEST_WAIT && open.wait * 2 >= LONGEST_WAIT {
            tracing::warn!(container = open.id, error = said, "no runtime says what this is; asking on");
        }
        open.wait = (open.wait * 2).min(LONGEST_WAIT);
    }

    /// Takes those whose time has come. Who starts and is not known for long waits with the others.
    fn wake(&mut self) {
        let now = Instant::now();
        while let Some((due, slot)) = self.later.first().copied() {
            if due > now {
                return;
            }
            self.later.pop_first();
            if let Some(open) = self.open.get(&slot) {
                let starts = open.starts && open.wait < LONGEST_WAIT;
                self.queue(slot, starts);
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
        let ended = asking.asked.join_next_with_id().await.unwrap();
        assert!(ended.as_ref().unwrap().1.is_err());
        asking.ended(ended);
    }

    #[tokio::test]
    async fn who_starts_comes_before_those_that_were_there() {
        let mut asking = asking();
        for slot in 0..1000 {
            asking.take(slot, slot.to_string(), Duration::ZERO, false);
        }
        asking.ask();
        assert_eq!(asking.asked.len(), AT_ONCE);
        asking.take(1000, "first".to_owned(), Duration::ZERO, true);
        asking.take(1001, "second".to_owned(), Duration::ZERO, true);
        one_ends(&mut asking).await;
        asking.ask();
        assert!(is_asked_about(&asking, 1000));
        assert!(!is_asked_about(&asking, 1001));
        one_ends(&mut asking).await;
        asking.ask();
        assert!(is_asked_about(&asking, 1001));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_unknown_for_long_waits_behind_the_others() {
        let mut asking = asking();
        asking.take(1, "unknown".to_owned(), Duration::ZERO, true);
        while asking.open[&1].wait < LONGEST_WAIT {
            asking.ask();
            one_ends(&mut asking).await;
            tokio::time::advance(LONGEST_WAIT).await;
            asking.wake();
        }
        asking.ask();
        one_ends(&mut asking).await;
        asking.take(2, "other".to_owned(), Duration::ZERO, false);
        tokio::time::advance(LONGEST_WAIT).await;
        asking.wake();
        assert_eq!(asking.others, [2, 1]);
        asking.forget(2);
        asking.ask();
        assert!(is_asked_about(&asking, 1));
        assert!(!asking.open.contains_key(&2));
    }

    #[tokio::test]
    async fn what_became_of_a_forgotten_question_is_not_the_new_ones() {
        let mut asking = asking();
        asking.take(1, "before".to_owned(), Duration::ZERO, true);
        asking.ask();
        let ended = asking.asked.join_next_with_id().await.unwrap();
        asking.take(1, "after".to_owned(), Duration::ZERO, true);
        asking.ask();
        asking.ended(ended);
        assert!(is_asked_about(&asking, 1));
    }
}
