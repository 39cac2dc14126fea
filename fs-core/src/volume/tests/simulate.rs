//! Simulation: concurrent clients on whole volumes, compared with the model after every operation and after
//! remounts.

use std::cell::RefCell;
use std::rc::Rc;

use super::client::{Client, Ending};
use super::world::{SeedNote, Shape, empty_history, prepared, seeds, session};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 8;

/// Operations of each client between two mounts.
const OPS: usize = 120;

/// Clients of a run.
const CLIENTS: usize = 3;

/// Mounts of a run.
const SESSIONS: u64 = 2;

async fn random_session(client: &mut Client) -> Ending {
    client.check_all().await.expect("what was unmounted is there");
    assert_eq!(client.run(OPS).await, Ending::Finished);
    client.check_all().await.expect("what was done is there");
    Ending::Finished
}

/// Runs a seed and returns the hash of all that happened.
pub(super) fn simulate(seed: u64) -> u64 {
    let _note = SeedNote(seed);
    let shape = Shape::random(seed);
    let (disk, history) = prepared(&shape, CLIENTS);
    let history = Rc::new(RefCell::new(history));
    let mut hash = 0_u64;
    for salt in 0..=SESSIONS {
        let outcome = session(&shape, &disk, &history, 10 + salt, async |client: &mut Client| {
            random_session(client).await
        });
        hash = hash.rotate_left(7) ^ outcome.trace;
    }
    hash ^ disk.image().content_hash()
}

#[test]
fn concurrent_clients_see_what_the_model_says() {
    for seed in seeds(SEEDS) {
        simulate(seed);
    }
}

#[test]
fn same_seed_twice_is_the_same_run() {
    // From one image: a volume's identity is not drawn from the seed.
    let shape = Shape::random(99);
    let image = prepared(&shape, CLIENTS).0.image();
    let run = || {
        let disk = shape.disk(image.clone());
        let history = Rc::new(RefCell::new(empty_history(CLIENTS)));
        session(&shape, &disk, &history, 10, async |client: &mut Client| random_session(client).await).trace
    };
    assert_eq!(run(), run());
}
