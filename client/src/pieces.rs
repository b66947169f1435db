//! Bytes of a stream in the pieces they came in.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

use crate::limits::{JOINED_BYTES, PIECE_BYTES_MIN, PIECES_KEPT, PIECES_MIN};

/// What has come of a stream and is not taken yet.
///
/// What lies within one piece is handed out as it is, and keeps the memory of what came with it alive: as a rule
/// the 64 KiB that the kernel hands over at once; where datagrams were lost or came faster than they were read, up
/// to a stream's window, because the QUIC library puts them together then. What spans pieces is copied; if they are
/// small on the average, all that is there is.
#[derive(Default)]
pub struct Pieces {
    /// None of them is empty.
    pieces: VecDeque<Bytes>,
    bytes: usize,
    /// What spans pieces is put together here, one thing behind the other.
    joined: BytesMut,
}

impl Pieces {
    /// Puts a piece behind the others. Many small ones are put together, because each may keep a whole datagram.
    pub fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        self.bytes += piece.len();
        self.pieces.push_back(piece);
        if self.pieces.len() > PIECES_MIN + self.bytes / PIECE_BYTES_MIN {
            let all = self.join(self.bytes);
            self.bytes = all.len();
            self.pieces.push_back(all);
        }
    }

    /// The first bytes, if there are so many.
    pub fn first<const N: usize>(&self) -> Option<[u8; N]> {
        let mut first = [0; N];
        let mut filled = 0;
        for piece in &self.pieces {
            let part = piece.len().min(N - filled);
            first[filled..filled + part].copy_from_slice(&piece[..part]);
            filled += part;
            if filled == N {
                return Some(first);
            }
        }
        None
    }

    /// Bytes of several pieces as one.
    fn join(&mut self, bytes: usize) -> Bytes {
        let mut joined = std::mem::take(&mut self.joined);
        if joined.capacity() < bytes {
            joined = BytesMut::with_capacity(self.bytes.min(JOINED_BYTES).max(bytes));
        }
        while joined.len() < bytes {
            let part = self.chunk().len().min(bytes - joined.len());
            joined.extend_from_slice(&self.chunk()[..part]);
            self.advance(part);
        }
        let out = joined.split().freeze();
        if self.bytes > 0 && joined.capacity() > 0 {
            self.joined = joined;
        }
        out
    }

    fn took(&mut self, bytes: usize) {
        assert!(bytes <= self.bytes, "no more is taken than is there");
        self.bytes -= bytes;
        if self.bytes == 0 {
            // A stream on which nothing comes holds little.
            self.joined = BytesMut::new();
            self.pieces.shrink_to(PIECES_KEPT);
        }
    }
}

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.bytes
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| &piece[..])
    }

    fn advance(&mut self, mut bytes: usize) {
        self.took(bytes);
        while let Some(piece) = self.pieces.front_mut() {
            if piece.len() > bytes {
                piece.advance(bytes);
                return;
            }
            bytes -= piece.len();
            self.pieces.pop_front();
        }
    }

    fn copy_to_bytes(&mut self, bytes: usize) -> Bytes {
        assert!(bytes <= self.bytes, "no more is taken than is there");
        if self.chunk().len() < bytes {
            return self.join(bytes);
        }
        self.took(bytes);
        let Some(piece) = self.pieces.front_mut() else {
            return Bytes::new();
        };
        let part = piece.split_to(bytes);
        if piece.is_empty() {
            self.pieces.pop_front();
        }
        part
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pieces(all: &[Vec<u8>]) -> Pieces {
        let mut pieces = Pieces::default();
        for piece in all {
            pieces.push(Bytes::from(piece.clone()));
        }
        pieces
    }

    #[test]
    fn what_lies_in_one_piece_is_not_copied() {
        let piece = Bytes::from(vec![1, 2, 3, 4]);
        let at = piece.as_ptr();
        let mut pieces = Pieces::default();
        pieces.push(piece);
        assert_eq!(pieces.copy_to_bytes(1).as_ptr(), at);
        let rest = pieces.copy_to_bytes(3);
        assert_eq!(rest.as_ptr(), at.wrapping_add(1));
        assert_eq!(rest[..], [2, 3, 4]);
    }

    #[test]
    fn what_spans_pieces_shares_room_with_its_neighbours() {
        let mut pieces = pieces(&[vec![1], vec![2, 3], vec![4]]);
        let (one, two) = (pieces.copy_to_bytes(2), pieces.copy_to_bytes(2));
        assert_eq!((&one[..], &two[..]), (&[1, 2][..], &[3, 4][..]));
        assert_eq!(two.as_ptr(), one.as_ptr().wrapping_add(2));
        assert_eq!(pieces.remaining(), 0);
    }

    #[test]
    fn small_pieces_do_not_pile_up() {
        let mut pieces = Pieces::default();
        for n in 0..20_000_u32 {
            pieces.push(Bytes::from(vec![n as u8]));
            assert!(pieces.pieces.len() <= PIECES_MIN + pieces.bytes / PIECE_BYTES_MIN);
        }
        let all = pieces.copy_to_bytes(20_000);
        assert!(all.iter().zip(0..20_000_u32).all(|(&a, n)| a == n as u8));
        assert!(pieces.pieces.capacity() <= 2 * PIECES_KEPT);
    }

    proptest! {
        #[test]
        fn pieces_read_as_the_bytes_they_are_of(
            all in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..20),
            steps in proptest::collection::vec((any::<bool>(), 0..30_usize), 0..30),
        ) {
            let (mut pieces, whole) = (pieces(&all), all.concat());
            let mut rest = &whole[..];
            for (is_passed_over, bytes) in steps {
                prop_assert_eq!(pieces.first::<4>(), rest.first_chunk::<4>().copied());
                let bytes = bytes.min(rest.len());
                if is_passed_over {
                    pieces.advance(bytes);
                } else {
                    prop_assert_eq!(&pieces.copy_to_bytes(bytes)[..], &rest[..bytes]);
                }
                rest = &rest[bytes..];
                prop_assert_eq!(pieces.remaining(), rest.len());
                prop_assert_eq!(pieces.chunk().is_empty(), rest.is_empty());
            }
        }
    }
}
