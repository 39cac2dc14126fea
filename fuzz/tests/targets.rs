//! Every target, over its corpus and a few thousand made-up inputs: what an ordinary test run does of a fuzz campaign.

use std::path::Path;

use pollux_fuzz::TARGETS;
use pollux_fuzz::campaign::{Campaign, load_corpus};

/// Inputs of each target.
const INPUTS: u64 = 3000;

/// Inputs of targets that take whole volumes through a mount: each needs some milliseconds.
const INPUTS_OF_VOLUMES: u64 = 300;

#[test]
fn fuzz_targets_survive_their_corpus_and_a_few_thousand_seeds() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in TARGETS {
        let campaign = Campaign::new(1, load_corpus(&root.join(target.name)));
        let inputs = if ["mount", "fsck"].contains(&target.name) { INPUTS_OF_VOLUMES } else { INPUTS };
        for number in 0..inputs {
            let input = campaign.input(number);
            let failed = std::panic::catch_unwind(|| (target.run)(&input)).is_err();
            assert!(!failed, "{}: input {number} of seed 1 failed: {input:02x?}", target.name);
        }
    }
}

#[test]
fn an_input_follows_from_seed_and_number() {
    let inputs = |seed| -> Vec<Vec<u8>> {
        let campaign = Campaign::new(seed, vec![vec![1, 2, 3]]);
        (0..100).map(|number| campaign.input(number)).collect()
    };
    assert_eq!(inputs(7), inputs(7));
    assert_ne!(inputs(7), inputs(8));
}
