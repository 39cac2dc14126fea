//! Random operations against a sorted map.

use super::*;

#[derive(Clone, Debug)]
enum Operation {
    Insert(Key, Filling),
    Remove(Key),
    RemoveNth(usize),
    RemoveRange(Key, Key),
    Apply(Vec<(Key, Option<Filling>)>),
    /// Many neighbouring items at once: from a key on, one change for each of these.
    ApplyMany(Key, Vec<Option<Filling>>),
    Look(Key, Key),
    Hold(usize),
    NextEpoch,
    Freeze,
    WriteFrozen(usize),
    ForgetFrozen(usize),
    Evict(usize),
}

/// A value, in short.
#[derive(Clone, Copy, Debug)]
struct Filling {
    length: usize,
    seed: u8,
}

impl Filling {
    fn bytes(self) -> Vec<u8> {
        (0..self.length).map(|at| self.seed.wrapping_add((at % 251) as u8)).collect()
    }
}

fn any_key() -> impl Strategy<Value = Key> {
    let part = |end: u64| prop_oneof![20 => 0..end, 1 => Just(u64::MAX)];
    (part(4), prop_oneof![20 => 0..2u8, 1 => Just(u8::MAX)], part(120), part(2))
        .prop_map(|(object, kind, offset, minor)| Key::new(object, ItemKind::new(kind), offset, minor))
}

fn any_value() -> impl Strategy<Value = Filling> {
    let length = prop_oneof![
        4 => 0..64usize,
        3 => 64..1200usize,
        2 => 3500..=MAX_VALUE,
        1 => Just(MAX_VALUE),
    ];
    (length, any::<u8>()).prop_map(|(length, seed)| Filling { length, seed })
}

/// Mostly small values, as where many items change; seldom a removal, often none.
fn many_changes() -> impl Strategy<Value = Vec<Option<Filling>>> {
    let value = prop_oneof![12 => 0..64usize, 1 => 0..=MAX_VALUE];
    let filling = (value, any::<u8>()).prop_map(|(length, seed)| Filling { length, seed });
    (0..3u32).prop_flat_map(move |removals| {
        let change = prop_oneof![removals => Just(None), 10 => filling.clone().prop_map(Some)];
        proptest::collection::vec(change, 8..160)
    })
}

fn any_operation() -> impl Strategy<Value = Operation> {
    let change = (any_key(), proptest::option::of(any_value()));
    prop_oneof![
        30 => (any_key(), any_value()).prop_map(|(key, value)| Operation::Insert(key, value)),
        4 => any_key().prop_map(Operation::Remove),
        12 => any::<usize>().prop_map(Operation::RemoveNth),
        1 => (any_key(), any_key()).prop_map(|(from, to)| Operation::RemoveRange(from, to)),
        4 => proptest::collection::vec(change, 0..12).prop_map(Operation::Apply),
        2 => (any_key(), many_changes()).prop_map(|(from, changes)| Operation::ApplyMany(from, changes)),
        6 => (any_key(), any_key()).prop_map(|(from, to)| Operation::Look(from, to)),
        2 => any::<usize>().prop_map(Operation::Hold),
        2 => Just(Operation::NextEpoch),
        3 => Just(Operation::Freeze),
        3 => any::<usize>().prop_map(Operation::WriteFrozen),
        1 => any::<usize>().prop_map(Operation::ForgetFrozen),
        4 => (0..40usize).prop_map(Operation::Evict),
    ]
}

type Model = BTreeMap<Key, Vec<u8>>;

struct Run {
    bench: Bench,
    model: Model,
    frozen: Vec<(FrozenTree, Model)>,
    held: Vec<(Value, Vec<u8>)>,
    /// Keys touched since the last eviction: they must not miss.
    touched: Vec<Key>,
}

impl Run {
    fn step(&mut self, operation: Operation) {
        match &operation {
            Operation::Look(key, _) | Operation::Remove(key) | Operation::Insert(key, _) => {
                self.bench.retry(|bench| bench.tree.touch(key));
                self.touched.push(*key);
            }
            Operation::Evict(_) => self.touched.clear(),
            _ => {}
        }
        self.run_operation(operation);
        for key in &self.touched {
            assert_eq!(self.bench.tree.touch(key), Ok(()), "only eviction takes nodes out of memory");
        }
    }

    fn run_operation(&mut self, operation: Operation) {
        match operation {
            Operation::Insert(key, value) => self.insert(key, value.bytes()),
            Operation::Remove(key) => self.remove(&key),
            Operation::RemoveNth(nth) => {
                let key = self.model.keys().nth(nth % self.model.len().max(1)).copied();
                key.into_iter().for_each(|key| self.remove(&key));
            }
            Operation::RemoveRange(from, to) => {
                let keys: Vec<_> =
                    self.model.keys().filter(|key| (from..to).contains(key)).copied().collect();
                keys.iter().for_each(|key| self.remove(key));
            }
            Operation::Apply(changes) => {
                let changes = changes.into_iter().map(|(key, value)| (key, value.map(Filling::bytes)));
                self.apply(changes.collect());
            }
            Operation::ApplyMany(from, changes) => {
                let changes = changes.into_iter().enumerate().map(|(at, value)| {
                    let key = Key { offset: from.offset.wrapping_add(at as u64), ..from };
                    (key, value.map(Filling::bytes))
                });
                self.apply(changes.collect());
            }
            Operation::Look(from, to) => self.look(&from, &to),
            Operation::Hold(nth) => self.hold(nth),
            Operation::NextEpoch => self.bench.epoch = self.bench.epoch.next().unwrap(),
            Operation::Freeze => {
                self.frozen.push((self.bench.tree.freeze(), self.model.clone()));
                self.bench.epoch = self.bench.epoch.next().unwrap();
            }
            Operation::WriteFrozen(nth) if !self.frozen.is_empty() => {
                let (frozen, model) = self.frozen.remove(nth % self.frozen.len());
                let root = self.bench.write(&frozen);
                assert_eq!(self.bench.stored(root), model);
            }
            Operation::ForgetFrozen(nth) if !self.frozen.is_empty() => {
                self.frozen.remove(nth % self.frozen.len());
            }
            Operation::WriteFrozen(_) | Operation::ForgetFrozen(_) => {}
            Operation::Evict(nodes) => {
                let target = nodes * node::NODE_MEMORY;
                let before = self.bench.tree.resident_bytes();
                let end = self.bench.tree.evict(target);
                let after = self.bench.tree.resident_bytes();
                assert!(after <= before && (end != Eviction::Enough || after <= target));
            }
        }
    }

    fn insert(&mut self, key: Key, value: Vec<u8>) {
        let inserted = self.bench.insert(key, &value);
        let expected =
            if self.model.insert(key, value).is_some() { Inserted::Replaced } else { Inserted::New };
        assert_eq!(inserted, expected);
    }

    fn remove(&mut self, key: &Key) {
        assert_eq!(self.bench.remove(key), self.model.remove(key).is_some());
    }

    fn apply(&mut self, changes: BTreeMap<Key, Option<Vec<u8>>>) {
        self.bench.retry(|bench| {
            let before = bench.space.allocations;
            let changes = changes.iter().map(|(key, value)| (key, value.as_deref()));
            let needed = bench.tree.nodes_needed(changes.clone());
            let outcome = bench.tree.apply(changes, bench.epoch, &mut bench.space);
            assert_eq!(outcome.err(), needed.err(), "what was counted misses nothing");
            let allocated = bench.space.allocations - before;
            // The bound at the root is for nodes of the format's size.
            if let Ok(needed) = needed
                && bench.tree.fanout == INNER_CAPACITY
            {
                assert!(allocated <= needed, "{allocated} nodes, {needed} were counted");
            }
            assert!(outcome.is_ok() || allocated == 0, "a miss must change nothing");
            outcome
        });
        for (key, value) in changes {
            match value {
                Some(value) => self.model.insert(key, value),
                None => self.model.remove(&key),
            };
        }
    }

    fn look(&mut self, from: &Key, to: &Key) {
        let owned = |(key, value): (Key, Value)| (key, value.to_vec());
        let clone = |(key, value): (&Key, &Vec<u8>)| (*key, value.clone());
        let got = self.bench.retry(|bench| bench.tree.get(from)).map(|value| value.to_vec());
        assert_eq!(got.as_ref(), self.model.get(from));
        assert_eq!(self.bench.retry(|bench| bench.tree.with(from, <[u8]>::to_vec)), got);
        let next = self.bench.retry(|bench| bench.tree.next(from)).map(owned);
        assert_eq!(next, self.model.range(from..).next().map(clone));
        let prev = self.bench.retry(|bench| bench.tree.prev(from)).map(owned);
        assert_eq!(prev, self.model.range(..=from).next_back().map(clone));
        let limit = 7;
        let scanned = self.bench.retry(|bench| {
            let mut seen = Vec::new();
            bench.tree.scan(from, to, |key, value| {
                seen.push((*key, value.to_vec()));
                if seen.len() == limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
            Ok(seen)
        });
        let expected: Vec<_> =
            self.model.iter().filter(|(key, _)| (from..=to).contains(key)).take(limit).map(clone).collect();
        assert_eq!(scanned, expected);
    }

    fn hold(&mut self, nth: usize) {
        let Some((key, bytes)) = self.model.iter().nth(nth % self.model.len().max(1)) else { return };
        let value = self.bench.retry(|bench| bench.tree.get(key)).unwrap();
        self.held.push((value, bytes.clone()));
    }

    /// What must be true in the end.
    fn finish(mut self) {
        for (value, bytes) in &self.held {
            assert_eq!(&value[..], bytes, "a value changed under its holder");
        }
        self.held.clear();
        assert_eq!(self.bench.retry(|bench| items_of(&bench.tree)), self.model);
        for (frozen, model) in std::mem::take(&mut self.frozen) {
            let root = self.bench.write(&frozen);
            assert_eq!(self.bench.stored(root), model);
        }
        let root = self.bench.checkpoint();
        assert_eq!(self.bench.stored(root), self.model);
        let nodes: BTreeSet<_> = self.bench.stored_nodes(root).into_keys().collect();
        assert_eq!(nodes, self.bench.space.used, "places in use are those of the tree's nodes");
        // With nothing dirty and nobody holding a node, everything but the root can go.
        while self.bench.tree.evict(0) == Eviction::More {}
        assert_eq!(self.bench.tree.resident_bytes(), node::NODE_MEMORY);
        assert_eq!(self.bench.retry(|bench| items_of(&bench.tree)), self.model);
    }
}

fn run(fanout: usize, operations: Vec<Operation>) {
    let bench = Bench::new(fanout);
    let mut run =
        Run { bench, model: Model::new(), frozen: Vec::new(), held: Vec::new(), touched: Vec::new() };
    operations.into_iter().for_each(|operation| run.step(operation));
    run.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn tree_equals_a_sorted_map_whatever_is_frozen_written_or_dropped(
        fanout in prop_oneof![Just(4usize), Just(7), Just(INNER_CAPACITY)],
        operations in proptest::collection::vec(any_operation(), 0..400),
    ) {
        run(fanout, operations);
    }
}
