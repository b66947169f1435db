use super::*;

fn pinned(rig: &Rig, subs: [SubscriptionId; 3]) -> [u64; 3] {
    subs.map(|sub| rig.view(sub).pinned_bytes)
}

// SEMANTICS 6
#[test]
fn a_subscription_pins_what_no_other_keeps() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let subs = ["a", "b", "c"].map(|name| rig.sub(topic, name));
    rig.publish(topic, 10);
    let bytes = rig.queue.topic_view(topic).unwrap().bytes;
    assert_eq!(pinned(&rig, subs), [0; 3], "each is kept by three");
    for (session, sub) in (1..).zip(subs) {
        rig.consumer(sub, session, 100);
    }
    rig.run();
    for (session, (sub, acked)) in (1..).zip(subs.into_iter().zip([2, 5, 6])) {
        rig.acks(sub, session, &[(0, 1, acked)]);
    }
    assert_eq!(pinned(&rig, subs), [bytes * 3 / 10, 0, 0]);
    rig.acks(subs[0], 1, &[(2, 1, 6)]);
    assert_eq!(pinned(&rig, subs), [0, bytes / 10, 0]);
    rig.acks(subs[1], 2, &[(5, 1, 5)]);
    assert_eq!(pinned(&rig, subs), [0, 0, bytes * 2 / 10]);
}

#[test]
fn subscriptions_of_several_topics_are_listed_up_to_a_limit() {
    let mut rig = Rig::new();
    let topics = ["t", "u"].map(|name| rig.topic(name));
    let subs = topics.map(|topic| ["a", "b"].map(|name| rig.sub(topic, name)));
    rig.publish(topics[0], 3);
    let all: Vec<_> = subs
        .into_iter()
        .flatten()
        .map(|sub| rig.view(sub))
        .collect();
    for limit in 0..6 {
        let listed = rig.queue.subscriptions(topics, rig.now, limit);
        assert_eq!(listed, all[..limit.min(4)]);
    }
}
