//! Who waits for which chunk of an image: a chunk that several machines ask for is fetched once, and told to all.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use runnel_snapshot::protocol::FromAgent;
use runnel_snapshot::source::{Arrived, ChunkFailure, ChunkId, ChunkSink};

use super::line::Line;

/// A connected machine, as this table knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct MachineNumber(pub(super) u64);

#[derive(Default)]
struct Waiting {
    machines: HashMap<MachineNumber, Arc<Line>>,
    /// Whoever asked for a chunk that was not answered yet. A machine is in a list once.
    chunks: HashMap<ChunkId, Vec<MachineNumber>>,
}

/// The sink of an image's source.
#[derive(Default)]
pub(super) struct FanOut {
    waiting: Mutex<Waiting>,
    answered: Condvar,
}

impl FanOut {
    /// A machine that may ask from now on.
    pub(super) fn join(&self, machine: MachineNumber, line: Arc<Line>) {
        self.lock().machines.insert(machine, line);
    }

    /// A machine is gone: returns the chunks that nobody else waits for.
    pub(super) fn leave(&self, machine: MachineNumber) -> Vec<ChunkId> {
        let mut waiting = self.lock();
        waiting.machines.remove(&machine);
        let chunks: Vec<ChunkId> = waiting.chunks.keys().copied().collect();
        waiting.forget(machine, &chunks)
    }

    /// How many machines there are.
    pub(super) fn machines(&self) -> usize {
        self.lock().machines.len()
    }

    /// Those that have joined and not left.
    pub(super) fn numbers(&self) -> Vec<MachineNumber> {
        self.lock().machines.keys().copied().collect()
    }

    /// A machine will ask for these chunks.
    pub(super) fn expect(&self, machine: MachineNumber, chunks: &[ChunkId]) {
        let mut waiting = self.lock();
        for chunk in chunks {
            let machines = waiting.chunks.entry(*chunk).or_default();
            if !machines.contains(&machine) {
                machines.push(machine);
            }
        }
    }

    /// A machine wants these chunks no more: returns those that nobody else waits for.
    pub(super) fn forget(&self, machine: MachineNumber, chunks: &[ChunkId]) -> Vec<ChunkId> {
        self.lock().forget(machine, chunks)
    }

    /// Waits until none of these chunks is waited for by this machine.
    pub(super) fn wait_until_answered(&self, machine: MachineNumber, chunks: &[ChunkId]) {
        let waits = |waiting: &mut Waiting| {
            let is_waiting = |chunk| {
                waiting
                    .chunks
                    .get(chunk)
                    .is_some_and(|who: &Vec<_>| who.contains(&machine))
            };
            chunks.iter().any(is_waiting)
        };
        let waited = self.answered.wait_while(self.lock(), waits);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Tells all who wait for a chunk.
    fn answer(&self, chunk: ChunkId, answer: &FromAgent) {
        let lines: Vec<Arc<Line>> = {
            let mut waiting = self.lock();
            let machines = waiting.chunks.remove(&chunk).unwrap_or_default();
            machines
                .iter()
                .filter_map(|machine| waiting.machines.get(machine).cloned())
                .collect()
        };
        for line in lines {
            line.send(answer);
        }
        self.answered.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn forget(&mut self, machine: MachineNumber, chunks: &[ChunkId]) -> Vec<ChunkId> {
        let mut alone = Vec::new();
        for chunk in chunks {
            let Some(machines) = self.chunks.get_mut(chunk) else {
                continue;
            };
            let before = machines.len();
            machines.retain(|other| *other != machine);
            if machines.is_empty() {
                self.chunks.remove(chunk);
                if before > 0 {
                    alone.push(*chunk);
                }
            }
        }
        alone
    }
}

impl ChunkSink for FanOut {
    fn arrived(&self, chunk: ChunkId, what: Arrived) {
        self.answer(chunk, &FromAgent::Arrived(vec![(chunk, what)]));
    }

    fn failed(&self, chunk: ChunkId, failure: ChunkFailure) {
        self.answer(chunk, &FromAgent::Failed(chunk, failure));
    }
}

#[cfg(test)]
mod tests {
    use runnel_snapshot::protocol::PacketSocket;
    use runnel_snapshot::source::VolumeId;
    use runnel_snapshot::units::ChunkIndex;

    use super::*;

    fn chunk(number: u64) -> ChunkId {
        ChunkId {
            volume: VolumeId(0),
            chunk: ChunkIndex(number),
        }
    }

    fn machine(fan_out: &FanOut, number: u64) -> (MachineNumber, PacketSocket) {
        let (ours, theirs) = PacketSocket::pair().unwrap();
        fan_out.join(MachineNumber(number), Arc::new(Line::new(ours).unwrap()));
        (MachineNumber(number), theirs)
    }

    fn heard(socket: &PacketSocket) -> Option<FromAgent> {
        let mut message = Vec::new();
        socket.try_receive(&mut message).ok()?;
        (!message.is_empty()).then(|| FromAgent::parse(&message).unwrap())
    }

    #[test]
    fn an_answer_goes_once_to_each_who_asked_and_to_nobody_else() {
        let fan_out = FanOut::default();
        let (first, first_hears) = machine(&fan_out, 1);
        let (second, second_hears) = machine(&fan_out, 2);
        let (_, third_hears) = machine(&fan_out, 3);
        fan_out.expect(first, &[chunk(7), chunk(7)]);
        fan_out.expect(first, &[chunk(7)]);
        fan_out.expect(second, &[chunk(7)]);
        fan_out.arrived(chunk(7), Arrived::Data);
        let answer = FromAgent::Arrived(vec![(chunk(7), Arrived::Data)]);
        for hears in [&first_hears, &second_hears] {
            assert_eq!(heard(hears), Some(answer.clone()));
            assert_eq!(heard(hears), None);
        }
        assert_eq!(heard(&third_hears), None);
    }

    #[test]
    fn a_chunk_is_let_go_when_the_last_who_waits_does() {
        let fan_out = FanOut::default();
        let (first, hears) = machine(&fan_out, 1);
        let (second, _other) = machine(&fan_out, 2);
        fan_out.expect(first, &[chunk(1), chunk(2)]);
        fan_out.expect(second, &[chunk(2), chunk(3)]);
        assert_eq!(fan_out.forget(first, &[chunk(1), chunk(2), chunk(9)]), [chunk(1)]);
        let mut alone = fan_out.leave(second);
        alone.sort();
        assert_eq!(alone, [chunk(2), chunk(3)]);
        assert_eq!(fan_out.machines(), 1);
        fan_out.arrived(chunk(2), Arrived::Zero);
        assert_eq!(heard(&hears), None);
    }
}
