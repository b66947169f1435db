//! SIGKILL at random moments under load.

use crate::repeat;
use crate::world::World;

/// Processes that are killed in one world, and worlds.
const KILLS: u64 = 50;
const WORLDS: u64 = 4;

#[test]
#[ignore = "needs a machine of its own; .ci/machine runs it"]
fn killed_200_times_nothing_acknowledged_is_lost_or_doubled() {
    let mut kills = 0;
    repeat(WORLDS, |seed| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut world = World::new(folder.path().join("data"), seed);
        for _ in 0..KILLS {
            world.load_for_a_while();
            world.kill();
            kills += 1;
            world.start_well();
        }
        world.load_for_a_while();
        world.finish_well();
    });
    println!("durability: sigkills {kills}");
}
