//! The power of an ext4 cut under load.

use crate::disk::LoopDisk;
use crate::repeat;
use crate::world::World;

/// Cuts in one world, and worlds.
const CUTS: u64 = 100;
const WORLDS: u64 = 5;
/// So many cuts one that the broker is left to notice by itself.
const NOTICED_EVERY: u64 = 10;
/// What a world writes, twice.
const DISK_MIB: u64 = 512;

#[test]
#[ignore = "needs a machine of its own; .ci/machine runs it"]
fn after_500_power_cuts_nothing_acknowledged_is_lost_or_doubled() {
    let mut cuts = 0;
    repeat(WORLDS, |seed| {
        let mut disk = LoopDisk::new(DISK_MIB);
        let mut world = World::new(disk.path().join("data"), seed);
        for cut in 0..CUTS {
            world.load_for_a_while();
            disk.cut();
            if cut % NOTICED_EVERY == 0 {
                let ended = world.ended();
                assert_eq!(ended.code, Some(1), "{ended:?}");
                let said = ended.stderr.lines().last().unwrap_or_default();
                assert!(said.contains("the process must stop now"), "{ended:?}");
            } else {
                world.kill();
            }
            disk.remount();
            cuts += 1;
            world.start_well();
        }
        world.load_for_a_while();
        world.finish_well();
    });
    println!("durability: power_cuts {cuts}");
}
