//! The network device's queues and configuration (virtio 1.3 §5.1.2, §5.1.4, §5.1.6.5).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::control::{open_control, serve_control};
use super::offer::{MIN_MTU, configuration, offered, pairs_set_up, queue_sizes, set_up};
use super::pair::{Pair, Rules, Stop};
use super::pair_thread::{Lent, PairThread, REST};
use super::tap::{NetError, Tap};
use crate::virtio::ring::{Ring, take_queue};
use crate::virtio::{
    Activation, ActiveQueue, ConfigSpace, DeviceError, GuestMemory, Interrupt, Sources,
    VirtioDevice,
};

/// Name in errors.
pub(super) const NAME: &str = "net";
/// Device id (§5.1.1).
const DEVICE_TYPE: u16 = 1;

const CONTROL: u32 = 0x100;
const TAP: u32 = 0x200;
/// The thread of a pair is at its end.
const ENDED: u32 = 0x300;

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    rules: Rules,
    /// None: lent to a thread.
    pairs: Vec<Option<Pair>>,
    control: Option<Ring>,
    /// Pairs that the driver uses; the host's frames go to these.
    in_use: usize,
}

impl Active {
    /// Whether none but its own tap, of so many, delivers to a pair that is in use.
    fn alone(&self, pair: usize, taps: usize) -> bool {
        pair + self.in_use >= taps
    }
}

/// A tap, and whether it may have something to read.
struct Lane {
    tap: Tap,
    readable: bool,
}

impl Lane {
    fn wait(&self, token: u32, sources: &mut Sources<'_>) -> Result<(), DeviceError> {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        sources.add(self.tap.as_fd(), token, events).map_err(failed)
    }
}

/// A network interface on a tap.
pub struct Net {
    features: u64,
    /// None: lent to a thread, with the pair of its number.
    lanes: Vec<Option<Lane>>,
    mtu: u16,
    config: Arc<Vec<u8>>,
    active: Option<Active>,
    /// By pair.
    threads: BTreeMap<usize, PairThread>,
    /// How long a pair's thread stays without work; none if pairs may have no thread.
    rest: Option<Duration>,
}

impl Net {
    /// An interface with one queue pair for each descriptor of a tap that was opened with
    /// `IFF_VNET_HDR | IFF_NO_PI`. `mtu` is in bytes.
    ///
    /// # Errors
    /// If there are no or too many taps, or one refuses to be set up.
    pub fn new(taps: Vec<OwnedFd>, mac: [u8; 6], mtu: u16) -> Result<Self, NetError> {
        Ok(Self::with_taps(set_up(taps)?, mac, mtu))
    }

    /// As [`Self::new`], with taps that are set up.
    pub(super) fn with_taps(taps: Vec<Tap>, mac: [u8; 6], mtu: u16) -> Self {
        let mtu = mtu.max(MIN_MTU);
        let config = configuration(mac, taps.len(), mtu);
        let features = offered(taps.iter());
        let lane = |tap| Lane {
            tap,
            readable: false,
        };
        Self {
            features,
            lanes: taps.into_iter().map(|tap| Some(lane(tap))).collect(),
            mtu,
            config: Arc::new(config),
            active: None,
            threads: BTreeMap::new(),
            rest: None,
        }
    }

    /// Pairs after the first may have a thread each while they keep each other waiting: for a worker that may start threads.
    #[must_use]
    pub fn with_threads(mut self) -> Self {
        self.rest = Some(REST);
        self
    }

    /// As [`Self::with_threads`], with threads that stay this long without work.
    #[cfg(test)]
    pub fn with_rest(mut self, rest: Duration) -> Self {
        self.rest = Some(rest);
        self
    }

    /// Pairs that have a thread.
    #[cfg(test)]
    pub fn lent(&self) -> Vec<usize> {
        self.threads.keys().copied().collect()
    }

    /// An interface on a datagram socket instead of a tap.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn on_stand_in(fd: OwnedFd, mac: [u8; 6], mtu: u16) -> Self {
        Self::with_taps(vec![Tap::fake(fd)], mac, mtu)
    }

    /// Host to guest, from one tap; whether there was more than is done at once. With fewer pairs in use than taps, several
    /// taps share a pair.
    fn receive(&mut self, lane: usize) -> Result<bool, DeviceError> {
        let (Some(active), Some(Some(lane_state))) =
            (self.active.as_mut(), self.lanes.get_mut(lane))
        else {
            return Ok(false);
        };
        if !lane_state.readable {
            return Ok(false);
        }
        let memory = active.memory.memory();
        let Some(Some(pair)) = active.pairs.get_mut(lane % active.in_use) else {
            return Ok(false);
        };
        match pair.receive(&lane_state.tap, active.rules, &memory, &*active.interrupt)? {
            Stop::Tap => lane_state.readable = false,
            Stop::Queue => {}
            Stop::Budget => return pair.receive.call_again().map(|()| true),
        }
        Ok(false)
    }

    /// Guest to host, from one pair; whether there was more than is done at once.
    fn transmit(&mut self, index: usize) -> Result<bool, DeviceError> {
        let (Some(active), Some(Some(lane))) = (self.active.as_mut(), self.lanes.get(index)) else {
            return Ok(false);
        };
        let Some(Some(pair)) = active.pairs.get_mut(index) else {
            return Ok(false);
        };
        let memory = active.memory.memory();
        match pair.transmit(&lane.tap, active.rules, &memory, &*active.interrupt)? {
            // The tap's event, or the driver's kick, brings us back.
            Stop::Tap | Stop::Queue => Ok(false),
            Stop::Budget => pair.transmit.call_again().map(|()| true),
        }
    }

    /// Receives from every tap that delivers to this pair; as [`Self::receive`].
    fn receive_into(&mut self, pair: usize) -> Result<bool, DeviceError> {
        let Some(in_use) = self.active.as_ref().map(|active| active.in_use) else {
            return Ok(false);
        };
        let mut more = false;
        for lane in (pair..self.lanes.len()).step_by(in_use) {
            if pair < in_use {
                more |= self.receive(lane)?;
            }
        }
        Ok(more)
    }

    fn control(&mut self, sources: &mut Sources<'_>) -> Result<(), DeviceError> {
        // Before the driver is answered no pair is at work that it gives up.
        for index in self.stop_threads() {
            self.collect(index, sources)?;
        }
        let Some(active) = self.active.as_mut() else {
            return Ok(());
        };
        let Some(ring) = active.control.as_mut() else {
            return Ok(());
        };
        let memory = active.memory.memory();
        let pairs = active.pairs.len();
        let (asked, done) = serve_control(ring, &memory, &*active.interrupt, pairs)?;
        active.in_use = asked.unwrap_or(active.in_use);
        if done {
            // Frames may be waiting for a pair that is now in use.
            for pair in 0..self.lanes.len() {
                self.receive_into(pair)?;
            }
        }
        Ok(())
    }

    /// Has all threads end; which pairs are to be collected.
    fn stop_threads(&self) -> Vec<usize> {
        self.threads.values().for_each(PairThread::stop);
        self.threads.keys().copied().collect()
    }

    /// Gives a thread to a pair that waited for the one that was just served, or to that one, if it had `more` to do than is
    /// done at once: then everything waits for it, other interfaces too.
    fn spread(
        &mut self,
        served: usize,
        more: bool,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let (Some(rest), Some(active)) = (self.rest, &self.active) else {
            return Ok(());
        };
        let memory = active.memory.memory();
        // What a tap has cannot be seen without asking it. But who receives much acknowledges much.
        let waits = |index: usize| {
            let pair = active.pairs.get(index).and_then(Option::as_ref);
            let pending = pair.map(|pair| pair.transmit.pending(&memory));
            // A queue that breaks the rules is told by who serves it.
            matches!(pending, Some(Ok(1..)))
        };
        let mut lendable = (1..active.in_use).filter(|pair| active.alone(*pair, self.lanes.len()));
        let apart = lendable.find(|pair| if *pair == served { more } else { waits(*pair) });
        apart.map_or(Ok(()), |pair| self.lend(pair, rest, sources))
    }

    /// Gives a pair a thread, if the node does; else it stays here.
    fn lend(
        &mut self,
        index: usize,
        rest: Duration,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_mut() else {
            return Ok(());
        };
        let lane = self.lanes.get_mut(index).and_then(Option::take);
        let pair = active.pairs.get_mut(index).and_then(Option::take);
        let (Some(Lane { tap, .. }), Some(pair)) = (lane, pair) else {
            return Ok(());
        };
        // They were waited for. The thread looks first, so nothing that came is lost.
        let _ = pair.receive.leave_kicks(sources);
        let _ = pair.transmit.leave_kicks(sources);
        let _ = sources.remove(tap.as_fd());
        let lent = Lent {
            tap,
            pair,
            rules: active.rules,
            memory: active.memory.clone(),
            interrupt: Arc::clone(&active.interrupt),
        };
        match PairThread::start(lent, rest) {
            Ok(thread) => {
                let heard = sources.add(thread.call(), ENDED + token_of(index), EventSet::IN);
                self.threads.insert(index, thread);
                heard.map_err(failed)
            }
            Err(lent) => {
                self.take_back(index, *lent);
                self.wait_for(index, sources)
            }
        }
    }

    /// Takes a pair and its tap back from a thread, and waits for what they are told.
    fn collect(&mut self, index: usize, sources: &mut Sources<'_>) -> Result<(), DeviceError> {
        self.end_thread(index, sources)?;
        self.wait_for(index, sources)
    }

    /// As [`Self::collect`], without the waiting.
    fn end_thread(&mut self, index: usize, sources: &mut Sources<'_>) -> Result<(), DeviceError> {
        let Some(thread) = self.threads.remove(&index) else {
            return Ok(());
        };
        // It was added, unless that is what failed.
        let _ = sources.remove(thread.call());
        let (lent, outcome) = thread.end().ok_or_else(lost)?;
        self.take_back(index, lent);
        outcome
    }

    fn take_back(&mut self, index: usize, lent: Lent) {
        if let Some(lane) = self.lanes.get_mut(index) {
            *lane = Some(Lane {
                tap: lent.tap,
                readable: true,
            });
        }
        if let Some(active) = &mut self.active
            && let Some(pair) = active.pairs.get_mut(index)
        {
            *pair = Some(lent.pair);
        }
    }

    /// Waits again for what a pair that was lent is told; what has come meanwhile counts.
    fn wait_for(&self, index: usize, sources: &mut Sources<'_>) -> Result<(), DeviceError> {
        if let Some(active) = &self.active
            && let Some(Some(pair)) = active.pairs.get(index)
            && let Some(Some(lane)) = self.lanes.get(index)
        {
            let token = queue_token(2 * index);
            pair.receive.take_kicks_back(token, sources)?;
            pair.transmit.take_kicks_back(token + 1, sources)?;
            lane.wait(TAP + token_of(index), sources)?;
        }
        Ok(())
    }
}

fn failed(source: std::io::Error) -> DeviceError {
    DeviceError::Host {
        device: NAME,
        source,
    }
}

/// A thread broke that had a tap. None does in a release, where the VMM would have ended.
fn lost() -> DeviceError {
    failed(std::io::Error::other("the thread of a queue pair is gone"))
}

/// A pair's number, of which there are at most [`MAX_PAIRS`].
fn token_of(pair: usize) -> u32 {
    u32::try_from(pair).unwrap_or(0)
}

/// Where a queue pair's kick arrives: 2n for receive, 2n + 1 for transmit, like the queue's index.
fn queue_token(index: usize) -> u32 {
    // At most 2 * MAX_PAIRS.
    u32::try_from(index).unwrap_or(CONTROL - 1)
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        NAME
    }

    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        queue_sizes(self.lanes.len())
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        self.config.clone()
    }

    fn activate(
        &mut self,
        activation: Activation,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        let Activation {
            memory,
            features,
            mut queues,
            interrupt,
        } = activation;
        // Left for `deactivate` to take apart if anything fails.
        let active = self.active.insert(Active {
            memory,
            interrupt,
            rules: Rules::new(features, self.mtu),
            pairs: Vec::new(),
            control: None,
            in_use: 1,
        });
        let mut result = Ok(());
        let pairs = pairs_set_up(features, self.lanes.len());
        for pair in 0..pairs {
            result = result.and_then(|()| {
                let pair = open_pair(pair, &mut queues, features, sources)?;
                active.pairs.push(Some(pair));
                Ok(())
            });
        }
        result = result.and_then(|()| {
            active.control = open_control(NAME, &mut queues, pairs, features, CONTROL, sources)?;
            Ok(())
        });
        for (token, lane) in (TAP..).zip(&mut self.lanes) {
            result = result.and_then(|()| {
                let lane = lane.as_mut().ok_or_else(lost)?;
                lane.readable = true;
                lane.tap
                    .set_offloads(features)
                    .map_err(|error| failed(std::io::Error::other(error)))?;
                lane.wait(token, sources)
            });
        }
        if result.is_err() {
            self.deactivate(sources);
        }
        result
    }

    fn process(
        &mut self,
        token: u32,
        events: EventSet,
        sources: &mut Sources<'_>,
    ) -> Result<(), DeviceError> {
        if token == CONTROL {
            return self.control(sources);
        }
        if token >= ENDED {
            let index = (token - ENDED) as usize;
            // It may be another one by now, which has not.
            let called = self.threads.get(&index).is_some_and(PairThread::has_called);
            return if called {
                self.collect(index, sources)
            } else {
                Ok(())
            };
        }
        if token >= TAP {
            let lane = (token - TAP) as usize;
            if events.contains(EventSet::IN)
                && let Some(Some(lane)) = self.lanes.get_mut(lane)
            {
                lane.readable = true;
            }
            let more_in = self.receive(lane)?;
            let more_out = self.transmit(lane)?;
            return self.spread(lane, more_in || more_out, sources);
        }
        let pair = (token / 2) as usize;
        let Some(Some(queues)) = self.active.as_ref().and_then(|a| a.pairs.get(pair)) else {
            return Ok(());
        };
        let more = if token.is_multiple_of(2) {
            queues.receive.acknowledge();
            self.receive_into(pair)?
        } else {
            queues.transmit.acknowledge();
            self.transmit(pair)?
        };
        self.spread(pair, more, sources)
    }

    fn deactivate(&mut self, sources: &mut Sources<'_>) {
        for index in self.stop_threads() {
            // The driver has given up what it broke.
            let _ = self.end_thread(index, sources);
        }
        let Some(active) = self.active.take() else {
            return;
        };
        for pair in active.pairs.into_iter().flatten() {
            pair.receive.release(sources);
            pair.transmit.release(sources);
        }
        if let Some(control) = active.control {
            control.release(sources);
        }
        for lane in self.lanes.iter().flatten() {
            // It was not added if activation failed before, or if it was lent.
            let _ = sources.remove(lane.tap.as_fd());
        }
    }
}

fn open_pair(
    pair: usize,
    queues: &mut Vec<ActiveQueue>,
    features: u64,
    sources: &mut Sources<'_>,
) -> Result<Pair, DeviceError> {
    let index = u16::try_from(2 * pair).unwrap_or(u16::MAX - 1);
    let receive = take_queue(queues, NAME, index)?;
    let transmit = take_queue(queues, NAME, index + 1)?;
    let receive = Ring::new(receive, NAME, features, queue_token(2 * pair), sources)?;
    match Ring::new(transmit, NAME, features, queue_token(2 * pair + 1), sources) {
        Ok(transmit) => Ok(Pair { receive, transmit }),
        Err(error) => {
            receive.release(sources);
            Err(error)
        }
    }
}
