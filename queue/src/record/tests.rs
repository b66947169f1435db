use super::*;
use millpond_protocol::limits::SETTLE_OFFSETS_MAX;
use proptest::prelude::*;

fn bytes_of(record: &Record<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    record.encode(&mut out);
    out
}

fn settle() -> Record<'static> {
    Record::Settle {
        subscription: SubscriptionId(3),
        session: SessionId(5),
        acks: vec![AckRun {
            offset: Offset(7),
            delivery: Delivery(1),
            run: 4,
        }],
        items: vec![SettleEntry {
            lease: LeaseName {
                offset: Offset(11),
                delivery: Delivery(2),
            },
            outcome: Outcome::Nack {
                delay_ms: None,
                code: 9,
                reason: "no".into(),
            },
            begun_at: Some(Stamp(5)),
            history: vec![HistoryItem {
                at: Stamp(4),
                duration_ms: 3,
                consumer: "c".into(),
                outcome: FailureKind::Nack,
                code: 8,
            }],
        }],
    }
}

#[test]
fn the_bytes_of_a_publish_are_fixed_for_ever() {
    let record = Record::Publish {
        topic: TopicId(1),
        producer: ProducerKey(2),
        epoch: Epoch(3),
        previous: Sequence(4),
        count: 5,
        messages: b"xy",
    };
    let mut golden = vec![1, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
    golden.extend([4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, b'x', b'y']);
    assert_eq!(bytes_of(&record), golden);
    assert_eq!(record.kind(), 22);
    assert_eq!(Record::decode(22, &golden), Ok(record));
}

#[test]
fn the_bytes_of_a_settlement_are_fixed_for_ever() {
    let mut golden = vec![3, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0];
    golden.extend([7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0]);
    golden.extend([
        1, 11, 2, 0, 0, 9, 2, b'n', b'o', 1, 5, 1, 4, 3, 1, b'c', 0, 8,
    ]);
    assert_eq!(bytes_of(&settle()), golden);
    assert_eq!(Record::decode(33, &golden), Ok(settle()));
}

#[test]
fn the_bytes_of_a_lease_and_a_commit_are_fixed_for_ever() {
    let lease = Record::Lease {
        subscription: SubscriptionId(3),
        session: SessionId(5),
        ranges: vec![LeaseRange {
            offset: Offset(7),
            count: 8,
            delivery: Delivery(9),
        }],
    };
    let mut golden = vec![3, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0];
    golden.extend([7, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0]);
    assert_eq!(bytes_of(&lease), golden);
    assert_eq!(Record::decode(32, &golden), Ok(lease));
    let commit = Record::Commit {
        subscription: SubscriptionId(3),
        session: SessionId(5),
        next: Offset(6),
    };
    let golden = [
        3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(bytes_of(&commit), golden);
    assert_eq!(Record::decode(34, &golden), Ok(commit));
}

#[test]
fn the_bytes_of_cold_records_are_fixed_for_ever() {
    let create = Record::TopicCreate {
        name: "a",
        config: TopicConfig::default(),
    };
    assert_eq!(bytes_of(&create), [1, b'a', 0, 0, 0, 0, 0]);
    let mark = Record::Mark(Mark {
        next_topic: 2,
        next_subscription: 3,
        next_producer: 4,
        topics: vec![TopicMark {
            topic: TopicId(1),
            name: "a",
            first: Offset(5),
            next: Offset(300),
            bytes: 6,
        }],
        producers: vec![ProducerMark {
            producer: ProducerKey(7),
            topic: TopicId(1),
            name: Some("b"),
            epoch: Epoch(8),
            last: Sequence(9),
        }],
    });
    let mut golden = vec![2, 3, 4, 1, 1, 1, b'a', 5, 0xac, 2, 6];
    golden.extend([1, 7, 1, 1, 1, b'b', 8, 9]);
    assert_eq!(bytes_of(&mark), golden);
    let skip = Record::Skip {
        from: LogIndex(1),
        to: LogIndex(2),
        messages_max: 3,
    };
    assert_eq!(bytes_of(&skip), [1, 2, 3]);
    let expire = Record::Expire(Expired::TopicTtl {
        topic: TopicId(1),
        below: Offset(300),
    });
    assert_eq!(bytes_of(&expire), [3, 1, 0xac, 2]);
    let end = Record::SessionEnd {
        session: SessionId(1),
        clean: false,
        begun: vec![OffsetRun {
            offset: Offset(2),
            count: 1,
        }],
        story: Some(Story::default()),
    };
    assert_eq!(bytes_of(&end), [1, 0, 1, 2, 1, 1, 0, 0]);
    for record in [create, mark, skip, expire, end] {
        let bytes = bytes_of(&record);
        assert_eq!(Record::decode(record.kind(), &bytes), Ok(record));
    }
}

#[test]
fn a_kind_of_a_newer_version_is_named() {
    assert_eq!(Record::decode(200, &[]), Err(RecordError::Kind(200)));
}

#[test]
fn a_settlement_or_lease_of_more_offsets_than_any_frame_has_is_no_record() {
    let settle = |run| Record::Settle {
        subscription: SubscriptionId(3),
        session: SessionId(5),
        acks: vec![AckRun {
            offset: Offset(0),
            delivery: Delivery(1),
            run,
        }],
        items: Vec::new(),
    };
    let most = settle(SETTLE_OFFSETS_MAX as u32);
    assert_eq!(Record::decode(33, &bytes_of(&most)), Ok(most));
    let more = bytes_of(&settle(SETTLE_OFFSETS_MAX as u32 + 1));
    let error = RecordError::Layout { kind: 33 };
    assert_eq!(Record::decode(33, &more), Err(error));
    let lease = Record::Lease {
        subscription: SubscriptionId(3),
        session: SessionId(5),
        ranges: vec![LeaseRange {
            offset: Offset(0),
            count: SETTLE_OFFSETS_MAX as u32 + 1,
            delivery: Delivery(1),
        }],
    };
    let error = RecordError::Layout { kind: 32 };
    assert_eq!(Record::decode(32, &bytes_of(&lease)), Err(error));
}

#[test]
fn bytes_behind_a_record_are_an_error() {
    let mut bytes = bytes_of(&Record::TopicPurge { topic: TopicId(1) });
    bytes.push(0);
    let error = RecordError::Layout {
        kind: kind::TopicPurge,
    };
    assert_eq!(Record::decode(kind::TopicPurge, &bytes), Err(error));
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic(
        kind in any::<u8>(),
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        if let Ok(record) = Record::decode(kind, &bytes) {
            prop_assert_eq!(record.kind(), kind);
        }
    }
}
