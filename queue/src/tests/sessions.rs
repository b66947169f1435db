use millpond_protocol::control::{LostReason, MessageState};

use super::*;
use crate::record::Expired;

fn retry(rig: &Rig, sub: SubscriptionId, offset: u64) -> crate::state::redelivery::Retry {
    rig.queue.subscriptions[&sub]
        .retries
        .get(offset)
        .unwrap()
        .clone()
}

fn last_failure(rig: &Rig, sub: SubscriptionId, offset: u64) -> crate::state::redelivery::Failure {
    retry(rig, sub, offset).history().last().unwrap().clone()
}

/// One topic, one subscription, `count` messages handed to session 1.
fn handed(rig: &mut Rig, count: u64) -> SubscriptionId {
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, count);
    rig.consumer(sub, 1, count);
    assert_eq!(rig.run().len() as u64, count);
    sub
}

// SEMANTICS 1.2, 1.6
#[test]
fn a_clean_close_releases_at_once_and_charges_nothing() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 3);
    rig.say(1, 2);
    assert_eq!(rig.end(1), Outcome::SessionEnded);
    rig.consumer(sub, 2, 10);
    let got = rig.run();
    assert_eq!(got.len(), 3);
    assert!(
        got.iter()
            .all(|got| (got.session, got.attempt, got.delivery) == (2, 1, 2))
    );
    assert_eq!(retry(&rig, sub, 0).releases, 1);
    assert_eq!(code(&rig.end(1)), Some(ErrorCode::SessionEnded));
}

// SEMANTICS 1.6
#[test]
fn a_broken_connection_has_ten_seconds_to_come_back() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 2);
    rig.queue.detach(SessionId(1), rig.now);
    rig.run_for(9_900);
    assert_eq!(
        rig.queue.attach(SessionId(1), 0, rig.now),
        None,
        "not without its token"
    );
    let attached = rig.queue.attach(SessionId(1), 101, rig.now).unwrap();
    assert_eq!(attached.leases, [lease(0, 1), lease(1, 1)]);
    rig.run_for(9_900);
    assert_eq!(rig.view(sub).in_flight, 2);
    assert_eq!(rig.ack(sub, 1, 0, 1), settled(1));
    rig.queue.detach(SessionId(1), rig.now);
    rig.run_for(10_100);
    assert_eq!(rig.view(sub).in_flight, 0);
    assert_eq!(rig.queue.attach(SessionId(1), 101, rig.now), None);
}

// SEMANTICS 1.6: what holds for a restart holds for a broker that could hear nobody.
#[test]
fn time_in_which_the_broker_was_away_counts_against_no_session() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 2);
    rig.queue.detach(SessionId(1), rig.now);
    rig.run_for(5_000);
    rig.wait(12_000);
    rig.queue.was_away(12_000);
    rig.run_for(4_900);
    assert_eq!(rig.view(sub).in_flight, 2);
    rig.run_for(200);
    assert_eq!(rig.view(sub).in_flight, 0, "its own ten seconds are over");
}

// SEMANTICS 1.1
#[test]
fn a_consumer_that_holds_messages_and_does_not_renew_loses_them() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 2);
    rig.run_for(29_000);
    rig.queue.renew(SessionId(1), rig.now);
    rig.run_for(29_000);
    assert_eq!(rig.view(sub).in_flight, 2);
    rig.take_effects();
    rig.run_for(2_000);
    let lost = Effect::LeasesLost {
        session: SessionId(1),
        leases: vec![lease(0, 1), lease(1, 1)],
        reason: LostReason::LeaseExpired,
    };
    let ended = Effect::SessionEnded {
        session: SessionId(1),
        code: ErrorCode::SessionEnded,
    };
    assert_eq!(rig.take_effects(), [lost, ended]);
    assert_eq!(retry(&rig, sub, 0).failures, 0, "nothing was begun");
}

// SEMANTICS 1.1
#[test]
fn a_consumer_that_holds_nothing_need_not_renew() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 1);
    rig.ack(sub, 1, 0, 1);
    rig.run_for(3_600_000);
    let topic = rig.queue.topic_id("t").unwrap();
    rig.publish(topic, 1);
    rig.grant(1, 1);
    assert_eq!(rig.offsets(), [1]);
    rig.run_for(29_000);
    assert_eq!(
        rig.view(sub).in_flight,
        1,
        "its clock starts with the hand-out"
    );
}

// SEMANTICS 1.6
#[test]
fn a_broker_restart_charges_nothing() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 3);
    rig.say(1, 3);
    rig.publish(rig.queue.topic_id("t").unwrap(), 1);
    rig.apply(&Record::Start { recovery_epoch: 2 });
    rig.consumer(sub, 2, 10);
    assert_eq!(rig.offsets(), [3], "everything else is dispatched at once");
    rig.run_for(9_900);
    assert_eq!(rig.view(sub).in_flight, 4);
    rig.run_for(200);
    let got: Vec<_> = (0..3).map(|offset| retry(&rig, sub, offset)).collect();
    assert!(
        got.iter()
            .all(|retry| (retry.failures, retry.releases) == (0, 1)),
        "{got:?}"
    );
    assert!(got.iter().all(|retry| !retry.suspect));
    assert_eq!(
        rig.view(sub).in_flight,
        4,
        "they went to the other consumer"
    );
}

// SEMANTICS 1.6
#[test]
fn a_session_that_comes_back_after_a_restart_keeps_its_leases() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 2);
    rig.apply(&Record::Start { recovery_epoch: 2 });
    let attached = rig.queue.attach(SessionId(1), 101, rig.now).unwrap();
    assert_eq!(attached.leases.len(), 2);
    rig.run_for(29_000);
    assert_eq!(rig.acks(sub, 1, &[(0, 1, 2)]), settled(2));
}

// SEMANTICS 1.7
#[test]
fn a_lost_session_is_charged_for_the_one_message_that_was_begun() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 3);
    rig.say(1, 1);
    rig.queue.detach(SessionId(1), rig.now);
    rig.run_for(10_100);
    assert_eq!(retry(&rig, sub, 0).failures, 1);
    assert_eq!(
        last_failure(&rig, sub, 0).kind,
        crate::FailureKind::SessionLost
    );
    assert_eq!(
        (retry(&rig, sub, 1).failures, retry(&rig, sub, 1).releases),
        (0, 1)
    );
}

// SEMANTICS 1.7
#[test]
fn several_begun_messages_become_suspects_and_are_delivered_alone() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 4);
    rig.say(1, 2);
    rig.queue.detach(SessionId(1), rig.now);
    rig.run_for(10_100);
    assert_eq!(
        retry(&rig, sub, 0).failures + retry(&rig, sub, 1).failures,
        0
    );
    rig.consumer(sub, 2, 100);
    assert_eq!(rig.offsets(), [0], "alone");
    rig.ack(sub, 2, 0, 2);
    assert_eq!(rig.offsets(), [1], "alone");
    rig.say(2, 2);
    rig.queue.detach(SessionId(2), rig.now);
    rig.run_for(10_100);
    assert_eq!(
        retry(&rig, sub, 1).failures,
        1,
        "the one that kills its consumer is charged"
    );
    rig.consumer(sub, 3, 100);
    assert_eq!(rig.offsets(), [2, 3]);
}

// SEMANTICS 1.7
#[test]
fn a_suspect_waits_until_a_busy_session_is_empty() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 2);
    rig.say(1, 2);
    rig.queue.detach(SessionId(1), rig.now);
    rig.publish(rig.queue.topic_id("t").unwrap(), 4);
    rig.run_for(5_000);
    rig.consumer(sub, 2, 2);
    assert_eq!(rig.offsets(), [2, 3]);
    rig.run_for(6_000);
    rig.grant(2, 10);
    assert_eq!(rig.offsets(), [] as [u64; 0], "it runs empty first");
    rig.ack(sub, 2, 2, 1);
    assert_eq!(rig.offsets(), [] as [u64; 0]);
    rig.ack(sub, 2, 3, 1);
    assert_eq!(rig.offsets(), [0]);
    rig.ack(sub, 2, 0, 2);
    assert_eq!(rig.offsets(), [1]);
    rig.ack(sub, 2, 1, 2);
    assert_eq!(rig.offsets(), [4, 5]);
}

// SEMANTICS 1.7
#[test]
fn the_last_attempt_after_a_loss_is_delivered_alone() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let config = SubscriptionConfig {
        max_attempts: 2,
        ..plain()
    };
    let sub = rig.sub_with(topic, "s", config);
    rig.publish(topic, 3);
    rig.consumer(sub, 1, 1);
    rig.run();
    rig.say(1, 1);
    rig.queue.detach(SessionId(1), rig.now);
    rig.run_for(12_000);
    rig.consumer(sub, 2, 10);
    let got = rig.run();
    assert_eq!(got.len(), 1);
    assert_eq!((got[0].offset, got[0].attempt), (0, 2));
}

// SEMANTICS 1.1
#[test]
fn the_processing_clock_starts_when_the_message_is_begun() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let config = SubscriptionConfig {
        processing_timeout_ms: 5_000,
        ..plain()
    };
    let sub = rig.sub_with(topic, "s", config);
    rig.publish(topic, 2);
    rig.consumer(sub, 1, 2);
    rig.run();
    rig.run_for(10_000);
    rig.say(1, 1);
    rig.run_for(4_900);
    assert_eq!(rig.view(sub).in_flight, 2);
    rig.take_effects();
    rig.run_for(200);
    let lost = Effect::LeasesLost {
        session: SessionId(1),
        leases: vec![lease(0, 1)],
        reason: LostReason::ProcessingTimeout,
    };
    assert_eq!(rig.take_effects(), [lost]);
    assert_eq!(retry(&rig, sub, 0).failures, 1);
    assert_eq!(last_failure(&rig, sub, 0).duration_ms, 5_000);
    assert_eq!(rig.view(sub).in_flight, 1);
}

/// Each is told of with its history, and records and groups have a largest size.
#[test]
fn what_was_begun_together_and_takes_too_long_is_told_of_in_several_records() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let config = SubscriptionConfig {
        processing_timeout_ms: 5_000,
        ..plain()
    };
    let subs: Vec<_> = (0..12)
        .map(|nth| rig.sub_with(topic, &format!("s{nth}"), config.clone()))
        .collect();
    rig.publish(topic, 3_000);
    for (nth, sub) in (1..).zip(&subs) {
        rig.consumer(*sub, nth, 3_000);
    }
    rig.run();
    for (nth, sub) in (1..).zip(&subs) {
        assert_eq!(rig.view(*sub).in_flight, 3_000);
        rig.say(nth, 3_000);
    }
    let late = rig.now.plus_ms(5_100);
    let mut proposals = Vec::new();
    let is_more = rig.queue.dispatch(late, 8_192, &mut proposals);
    let mut items = Vec::new();
    for proposal in &proposals {
        if let Proposal::Log(record) = proposal {
            if let Record::Expire(Expired::Processing { items: told, .. }) = record {
                items.push(told.len());
            }
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            assert!(bytes.len() <= proposal.bytes());
            rig.apply(record);
        }
    }
    assert!(
        is_more && items.iter().all(|&items| items == 1_024),
        "{items:?}"
    );
    assert!((1..12).contains(&items.len()), "{items:?}");
    rig.run_for(5_200);
    for sub in subs {
        assert_eq!(rig.view(sub).in_flight, 0);
        assert_eq!(retry(&rig, sub, 2_999).failures, 1);
    }
}

// SEMANTICS 1.1
#[test]
fn extend_restarts_the_processing_clock() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let config = SubscriptionConfig {
        processing_timeout_ms: 5_000,
        ..plain()
    };
    let sub = rig.sub_with(topic, "s", config);
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 1);
    rig.run();
    rig.say(1, 1);
    for _ in 0..5 {
        rig.run_for(4_000);
        assert_eq!(rig.queue.extend(SessionId(1), lease(0, 1), rig.now), Ok(()));
    }
    assert_eq!(rig.view(sub).in_flight, 1);
    rig.run_for(5_100);
    assert_eq!(rig.view(sub).scheduled, 1);
    let gone = Err((ErrorCode::LeaseLost, MessageState::Scheduled));
    assert_eq!(rig.queue.extend(SessionId(1), lease(0, 1), rig.now), gone);
}

// SEMANTICS 1.1
#[test]
fn what_is_held_too_long_unbegun_is_called_back_uncharged() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 3);
    rig.say(1, 1);
    for _ in 0..3 {
        rig.run_for(19_900);
        rig.queue.renew(SessionId(1), rig.now);
    }
    assert_eq!(rig.view(sub).in_flight, 3);
    rig.take_effects();
    rig.run_for(500);
    let lost = Effect::LeasesLost {
        session: SessionId(1),
        leases: vec![lease(1, 1), lease(2, 1)],
        reason: LostReason::HoldMax,
    };
    assert_eq!(rig.take_effects(), [lost]);
    assert_eq!(
        (retry(&rig, sub, 1).failures, retry(&rig, sub, 1).releases),
        (0, 1)
    );
}

// SEMANTICS 1.1
#[test]
fn what_is_called_back_goes_to_the_next_consumer() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 1);
    rig.grant(1, 9);
    rig.consumer(sub, 2, 10);
    for looks in 0..4 {
        assert!(rig.dispatch().is_empty(), "look {looks}: nothing is ready");
    }
    let got = held_until_called_back(&mut rig, 1);
    assert_eq!(got.len(), 1);
    assert_eq!((got[0].session, got[0].delivery), (2, 2));
}

// SEMANTICS 1.1
#[test]
fn a_stuck_consumer_gets_one_at_a_time_until_it_begins() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 4);
    rig.grant(1, 100);
    let got = held_until_called_back(&mut rig, 1);
    assert_eq!(got.len(), 1, "one of four comes again: {got:?}");
    rig.say(1, 5);
    assert_eq!(rig.run().len(), 3);
    assert_eq!(rig.view(sub).in_flight, 4);
}

/// A minute passes in which a session lives and begins nothing; returns what is handed out then.
fn held_until_called_back(rig: &mut Rig, session: u64) -> Vec<Got> {
    for _ in 0..3 {
        rig.queue.renew(SessionId(session), rig.now);
        rig.run_for(19_900);
    }
    rig.queue.renew(SessionId(session), rig.now);
    // What is released waits a little.
    let got = rig.run_for(2_000);
    got.into_iter().map(|(_, got)| got).collect()
}

// DESIGN 2
#[test]
fn a_message_may_be_begun_before_its_lease_is_applied() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 1);
    let proposals = rig.dispatch();
    rig.say(1, 1);
    for proposal in proposals {
        rig.enact(&proposal, &mut Vec::new());
    }
    let begun = rig.queue.subscriptions[&sub].leases.get(0).unwrap().begun;
    assert!(begun.is_some());
}

// DESIGN 2
#[test]
fn a_lease_that_comes_after_the_end_of_its_session_is_void() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 2);
    rig.consumer(sub, 1, 1);
    rig.consumer(sub, 2, 1);
    let proposals = rig.dispatch();
    assert_eq!(proposals.len(), 2);
    rig.end(1);
    for proposal in proposals {
        rig.enact(&proposal, &mut Vec::new());
    }
    assert_eq!(rig.view(sub).in_flight, 1);
    rig.grant(2, 5);
    assert_eq!(rig.offsets().len(), 1, "what was refused comes again");
    assert_eq!(rig.view(sub).in_flight, 2);
}

// DESIGN 2: a begin mark about a part of another session's longer run once never ended
#[test]
fn a_begin_mark_for_what_another_session_holds_is_void() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 2);
    rig.apply(&Record::SubscriptionSeek {
        subscription: sub,
        to: StartPosition::Earliest,
    });
    rig.publish(rig.queue.topic_id("t").unwrap(), 5);
    rig.consumer(sub, 2, 10);
    assert_eq!(rig.run().len(), 7);
    rig.say(1, 2);
    let run = *rig.queue.subscriptions[&sub].leases.get(0).unwrap();
    assert_eq!((run.session, run.end, run.begun), (SessionId(2), 7, None));
    for _ in 0..4 {
        rig.run_for(25_000);
        rig.queue.renew(SessionId(2), rig.now);
    }
    assert_eq!(rig.queue.counters().leases_lost.get("hold_max"), Some(&7));
}

// SEMANTICS 1.6, 1.7
#[test]
fn a_suspect_stays_alone_over_a_restart() {
    let mut rig = Rig::new();
    let sub = handed(&mut rig, 2);
    rig.say(1, 2);
    rig.queue.detach(SessionId(1), rig.now);
    rig.run_for(10_100);
    rig.publish(rig.queue.topic_id("t").unwrap(), 3);
    rig.consumer(sub, 2, 100);
    assert_eq!(rig.offsets(), [0]);
    rig.apply(&Record::Start { recovery_epoch: 2 });
    rig.queue.attach(SessionId(2), 102, rig.now).unwrap();
    rig.say(2, 0);
    assert_eq!(rig.offsets(), [] as [u64; 0]);
    rig.ack(sub, 2, 0, 2);
    assert_eq!(rig.offsets(), [1]);
}

// SEMANTICS 1.1
#[test]
fn a_clock_that_was_set_again_is_forgotten_and_its_neighbours_go_on() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 10);
    rig.consumer(sub, 1, 10);
    rig.run();
    rig.say(1, 10);
    let mut most = 0;
    for _ in 0..700 {
        rig.wait(500);
        rig.queue
            .extend(SessionId(1), lease(0, 1), rig.now)
            .unwrap();
        rig.run();
        most = most.max(rig.queue.sessions[&SessionId(1)].live.clocks.len());
    }
    assert!(most <= 100, "{most}");
    let sub = &rig.queue.subscriptions[&sub];
    assert!(sub.leases.get(0).is_some(), "it was given time");
    assert_eq!(sub.leases.count(), 1, "the others were not");
}
