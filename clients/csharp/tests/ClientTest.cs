// The tests of the C# client; tests/clients/test_csharp.py runs them against a real server: ClientTest.exe HOST:PORT PIXELS.
// Writes the rows of a picture, top down, to PIXELS, and prints "ok" if all checks have passed.
using System;
using System.IO;
using System.Linq;
using System.Threading;
using System.Threading.Tasks;
using Safelight;

internal static class ClientTest
{
    private const int Width = 128, Height = 128, Pitch = 1024;

    private static int Main(string[] arguments)
    {
        using (var client = new Client(arguments[0]))
        {
            PollingGivesThePictureInTheEnd(client, arguments[1]);
            BuffersThatDoNotFitAreRefused(client);
            AnEncodedPictureIsNotRaw(client);
            ATaskGivesThePicture(client).Wait();
            ATaskCanBeCancelled(client).Wait();
            CancelSaysTheStep(client);
            CloseAndDisposeWakeWhoeverReads(client);
            LeavingTheLoopCloses(client);
            ErrorsSayWhatToChange(client);
        }
        WrongArgumentsAreRefusedHere(arguments[0]);
        AGenerationOutlivesItsClient(arguments[0]);
        WhatNobodyDisposesOfIsFreed(arguments[0]);
        Console.WriteLine("ok");
        return 0;
    }

    private static void PollingGivesThePictureInTheEnd(Client client, string file)
    {
        byte[] texture = Enumerable.Repeat((byte)0xEE, Pitch * Height).ToArray();
        int numPreviews = 0, lastStep = 0, width, height, step;
        using (Generation generation = client.Generate(Request(100, 7), TimeSpan.FromSeconds(60)))
        {
            while (generation.Wait(TimeSpan.FromSeconds(1.0 / 60)) < State.Succeeded)
            {
                if (generation.PollRgba8(0, texture, Pitch, false, out width, out height, out step) != PollResult.Copied) continue;
                Check(step > lastStep || step == 0, "previews go forward");
                lastStep = step;
                ++numPreviews;
            }
            Check(generation.State == State.Succeeded && generation.Error == null, "it succeeds");
            Check(numPreviews > 0, "previews come");
            Check(generation.TryGetSize(out width, out height) && width == Width && height == Height, "the size");
            Check(generation.Step(0, out int numSteps) == 100 && numSteps == 100, "the steps");
            var flipped = new byte[4 * Width * Height];
            PollResult last = generation.PollRgba8(0, texture, Pitch, false, out width, out height, out step);
            Check(last == PollResult.NothingNew || step == 0, "the picture is last");
            Picture picture = generation.Picture();
            Check(picture.Seed == 7 && picture.StrideBytes == 4 * Width && !picture.BottomUp, "the picture's fields");
            Check(generation.Picture(1) == null, "there is one picture");
            for (int row = 0; row < Height; ++row)
            {
                Check(texture.Skip(row * Pitch).Take(4 * Width).SequenceEqual(picture.Data.Skip(row * 4 * Width).Take(4 * Width)), "rows");
                Check(texture.Skip(row * Pitch + 4 * Width).Take(Pitch - 4 * Width).All(one => one == 0xEE), "padding stays");
            }
            File.WriteAllBytes(file, picture.Data);

            using (Generation again = client.Watch(generation.Name))
            {
                again.Wait();
                Check(again.PollRgba8(0, flipped, 0, true, out width, out height, out step) == PollResult.Copied, "flipped");
                Check(flipped.Take(4 * Width).SequenceEqual(picture.Data.Skip(4 * Width * (Height - 1))), "the lowest row first");
                Check(again.PollRgba8(0, flipped, 0, true, out width, out height, out step) == PollResult.NothingNew, "once");
            }
            using (Generation again = client.Watch(generation.Name))
            {
                again.Wait();
                var small = new byte[4 * 64 * 64];
                Check(again.PollScaledRgba8(0, small, 0, false, 64, 64, out step) == PollResult.Copied && small[3] == 255, "scaled");
            }
        }
    }

    private static void BuffersThatDoNotFitAreRefused(Client client)
    {
        using (Generation generation = client.Generate(Request(2, 7)))
        {
            generation.Wait();
            int width, height, step;
            Check(generation.PollRgba8(0, new byte[9], 0, false, out width, out height, out step) == PollResult.TooSmall, "buffer");
            Check(width == Width && height == Height, "the size that is needed");
            Check(generation.PollRgba8(0, new byte[4 * Width * Height], 8, false, out width, out height, out step) == PollResult.TooSmall, "pitch");
            Throws<ArgumentNullException>(() => generation.PollRgba8(0, null, 0, false, out width, out height, out step));
            Throws<ArgumentOutOfRangeException>(() => generation.PollRgba8(0, new byte[9], -1, false, out width, out height, out step));
            Check(generation.PollRgba8(0, new byte[4 * Width * Height], 0, false, out width, out height, out step) == PollResult.Copied, "it was not passed over");
        }
    }

    private static void AnEncodedPictureIsNotRaw(Client client)
    {
        GenerateRequest request = Request(2, 7);
        request.PictureMediaType = "image/png";
        using (Generation generation = client.Generate(request))
        {
            generation.Wait();
            int width, height, step;
            Check(generation.PollRgba8(0, new byte[4 * Width * Height], 0, false, out width, out height, out step) == PollResult.NotRaw, "a PNG");
        }
    }

    private static async Task ATaskGivesThePicture(Client client)
    {
        Picture[] pictures = await Task.WhenAll(Enumerable.Range(1, 8).Select(seed => client.PictureAsync(Request(4, (ulong)seed))));
        Check(pictures.Select(picture => picture.Seed).SequenceEqual(Enumerable.Range(1, 8).Select(seed => (ulong)seed)), "eight at once");
        using (Generation generation = client.Generate(Request(2, 7)))
        {
            Check(await Fails<ArgumentOutOfRangeException>(generation.PictureAsync(3)) != null, "no such output");
        }
    }

    private static async Task ATaskCanBeCancelled(Client client)
    {
        using (var cancellation = new CancellationTokenSource())
        {
            Task<Picture> picture = client.PictureAsync(Request(900, 7), null, cancellation.Token);
            cancellation.Cancel();
            await Fails<OperationCanceledException>(picture);
            Check(picture.IsCanceled, "the task is cancelled");
        }
    }

    private static void CancelSaysTheStep(Client client)
    {
        using (Generation generation = client.Generate(Request(900, 7)))
        {
            Progress progress = generation.OfType<Progress>().First(one => one.Step >= 2);
            Check(generation.State < State.Succeeded || generation.State == State.Closed, "leaving the loop closed it");
            GenerationInfo ended = client.Cancel(generation.Name);
            Check(ended.State == "STATE_CANCELLED" && ended.Outputs.Single().Step >= progress.Step, ended.Json);
            Check(client.Get(generation.Name).State == "STATE_CANCELLED", "the server says so too");
        }
        using (Generation generation = client.Generate(Request(900, 7)))
        {
            Check(generation.First() is Accepted accepted && accepted.WidthPx == Width && accepted.Generation == generation.Name, "accepted");
        }
        using (Generation generation = client.Generate(Request(900, 7)))
        {
            while (generation.Next() is Event next && !(next is Progress)) { }
            generation.Cancel();
            Check(Throws<SafelightException>(() => generation.Count()).Code == StatusCode.Cancelled, "the reader is told");
        }
    }

    private static void CloseAndDisposeWakeWhoeverReads(Client client)
    {
        using (Generation generation = client.Generate(Request(900, 7)))
        {
            Task<int> reader = Task.Run(() => generation.Count());
            while (generation.State == State.Asked) generation.Wait(TimeSpan.FromMilliseconds(5));
            generation.Close();
            Check(reader.Result > 0 && generation.Wait() == State.Closed, "closed");
        }
        Generation disposed = client.Generate(Request(900, 7));
        Task<State> waiting = Task.Run(() => disposed.Wait());
        while (disposed.State == State.Asked) disposed.Wait(TimeSpan.FromMilliseconds(5));
        disposed.Dispose();
        disposed.Dispose();
        try { Check(waiting.Result == State.Closed, "disposed"); }
        catch (AggregateException failure) { Check(failure.InnerException is ObjectDisposedException, failure.ToString()); }
        Throws<ObjectDisposedException>(() => disposed.Next());
        Throws<ObjectDisposedException>(() => disposed.Error.ToString());
    }

    private static void LeavingTheLoopCloses(Client client)
    {
        using (Generation generation = client.Generate(Request(900, 7)))
        {
            foreach (Event next in generation) break;
            Check(generation.Wait() == State.Closed, "closed");
        }
    }

    private static void ErrorsSayWhatToChange(Client client)
    {
        using (Generation generation = client.Generate(Request(0, 7)))
        {
            SafelightException error = Throws<SafelightException>(() => generation.Count());
            Check(error.Code == StatusCode.InvalidArgument && error.CodeName == "INVALID_ARGUMENT", error.ToString());
            Check(error.Reason == "INVALID_REQUEST" && error.RetryAfter == null, error.ToString());
            Check(error.Violations.Single().Field == "spec.num_inference_steps" && error.Violations[0].Description != "", "violations");
        }
        Check(Throws<SafelightException>(() => client.Get("generations/none")).Code == StatusCode.NotFound, "no such generation");
        Check(Throws<SafelightException>(() => client.Generate(GenerateRequest.FromJson("{\"spek\": 1}"))).Message.Contains("spek"), "unknown field");
    }

    private static void WrongArgumentsAreRefusedHere(string target)
    {
        Throws<ArgumentNullException>(() => new Client(null));
        Throws<ArgumentException>(() => new Client(target, new ClientOptions { CaPem = "PEM" }));
        Throws<ArgumentException>(() => new Client(target, new ClientOptions { Tls = true, KeyPem = "PEM" }));
        Check(Throws<SafelightException>(() => new Client("")).Code == StatusCode.InvalidArgument, "no target");
        Check(Throws<SafelightException>(() => new Client(target, new ClientOptions { ApiKey = "schlüssel" })).Code == StatusCode.InvalidArgument, "key");
        using (var client = new Client(target))
        {
            Throws<ArgumentNullException>(() => client.Generate((string)null));
            Throws<ArgumentException>(() => client.Generate("a\0b"));
            Throws<ArgumentException>(() => client.Generate(new GenerateRequest("a") { WidthPx = 128 }));
            Throws<ArgumentOutOfRangeException>(() => client.Generate("a", TimeSpan.Zero));
            client.Dispose();
            Throws<ObjectDisposedException>(() => client.Generate("a"));
        }
    }

    private static void AGenerationOutlivesItsClient(string target)
    {
        Generation generation;
        using (var client = new Client(target)) generation = client.Generate(new GenerateRequest("ein roter Trank, größer ☕") { NumInferenceSteps = 2 });
        using (generation)
        {
            string json = generation.OfType<Accepted>().First().Json;
            Check(json.Contains("größer ☕"), json);
        }
    }

    private static void WhatNobodyDisposesOfIsFreed(string target)
    {
        int before = Threads();
        for (int i = 0; i < 20; ++i) new Client(target).Generate(Request(900, 7)).Next();
        var deadline = DateTime.UtcNow.AddSeconds(30);
        while (Threads() > before + 10)  // the library has a thread for each generation
        {
            Check(DateTime.UtcNow < deadline, "finalizers end generations");
            GC.Collect();
            GC.WaitForPendingFinalizers();
        }
    }

    private static int Threads() => Directory.GetDirectories("/proc/self/task").Length;

    private static GenerateRequest Request(int steps, ulong seed) =>
        new GenerateRequest("a red potion") { NumInferenceSteps = steps, Seeds = { seed } };

    private static void Check(bool condition, string what)
    {
        if (!condition) throw new Exception("not so: " + what);
    }

    private static T Throws<T>(Action action) where T : Exception
    {
        try { action(); }
        catch (T expected) { return expected; }
        throw new Exception($"no {typeof(T).Name}");
    }

    private static async Task<T> Fails<T>(Task task) where T : Exception
    {
        try { await task; }
        catch (T expected) { return expected; }
        throw new Exception($"no {typeof(T).Name}");
    }
}
