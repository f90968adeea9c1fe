// The runner of the C# client. See clients/CONFORMANCE.md.
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Runtime.Serialization.Json;
using System.Security.Cryptography;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using System.Xml;
using System.Xml.Linq;
using Safelight;

/// <summary>JSON as the XML elements of System.Runtime.Serialization.Json, whose attribute "type" has their type.</summary>
internal static class Written
{
    internal static XElement Object(string name, params XElement[] fields) => Typed(name, "object", fields);
    internal static XElement Array(string name, IEnumerable<XElement> items) => Typed(name, "array", items);
    internal static XElement Text(string name, string text) => Typed(name, "string", text);
    internal static XElement Number(string name, object number) => Typed(name, "number", number);
    internal static XElement Null(string name) => Typed(name, "null", null);
    private static XElement Typed(string name, string type, object content)
    {
        if (IsName(name))
        {
            return new XElement(name, new XAttribute("type", type), content);
        }
        XNamespace item = "item";  // element of a key that is not an XML name, such as "spec.outputs[0]"
        return new XElement(item + "item", new XAttribute("item", name), new XAttribute("type", type), content);
    }

    private static bool IsName(string name)
    {
        try { return XmlConvert.VerifyNCName(name) != null; }
        catch (XmlException) { return false; }
    }

    internal static XElement Parse(string json)
    {
        byte[] text = Encoding.UTF8.GetBytes(json);
        using (var reader = JsonReaderWriterFactory.CreateJsonReader(text, XmlDictionaryReaderQuotas.Max))
        {
            return XElement.Load(reader);
        }
    }

    internal static string Json(XElement value)
    {
        var root = new XElement("root", value.Attributes(), value.Nodes());
        using (var stream = new MemoryStream())
        {
            using (var writer = JsonReaderWriterFactory.CreateJsonWriter(stream, new UTF8Encoding(false))) root.WriteTo(writer);
            return Encoding.UTF8.GetString(stream.ToArray());
        }
    }
}

/// <summary>The outcome of a generation that a runner prints.</summary>
internal sealed class Seen
{
    internal string Generation = "";
    internal readonly List<string> Reliable = new List<string>();
    internal readonly List<XElement> Steps = new List<XElement>();
    internal readonly List<XElement> Previews = new List<XElement>();
    internal readonly List<XElement> Pictures = new List<XElement>();
    internal long NumSteps;
    internal XElement Cancelled = Written.Null("cancelled");
    internal XElement Watched = Written.Null("watched");
    internal readonly List<long> ReceivedUs = new List<long>();
    internal SafelightException Error;

    internal XElement Write() => Written.Object(
        "item",
        Written.Text("code", Error?.CodeName ?? "OK"),
        Written.Text("reason", Error?.Reason ?? ""),
        Written.Text("message", Error?.Message ?? ""),
        Written.Object("violations", (Error?.Violations ?? new List<Violation>())
            .GroupBy(one => one.Field).Select(one => Written.Text(one.Key, one.Last().Description)).ToArray()),
        Error?.RetryAfter is TimeSpan after ? Written.Number("retry_after_s", after.TotalSeconds) : Written.Null("retry_after_s"),
        Written.Text("generation", Generation),
        Written.Array("reliable", Reliable.Select(one => Written.Text("item", one))),
        Written.Array("steps", Steps),
        Written.Array("previews", Previews),
        Written.Array("pictures", Pictures),
        Written.Number("num_steps", NumSteps),
        Cancelled,
        Watched,
        Written.Array("received_us", ReceivedUs.Select(one => Written.Number("item", one))));
}

internal static class Program
{
    private static readonly DateTime Epoch = new DateTime(1970, 1, 1, 0, 0, 0, DateTimeKind.Utc);

    private static int Main()
    {
        for (string line = Console.In.ReadLine(); line != null; line = Console.In.ReadLine()) Run(Written.Parse(line));
        return 0;
    }

    private static void Run(XElement given)
    {
        using (var client = new Client(string.Join(",", given.Element("targets").Elements().Select(one => one.Value)), Options(given)))
        {
            Task<XElement>[] all = given.Element("requests").Elements().Select(request => Task.Factory.StartNew(
                () => Generate(client, given, Written.Json(request)), TaskCreationOptions.LongRunning)).ToArray();
            Task.WaitAll(all);
            Console.WriteLine(Written.Json(Written.Object(
                "root", Written.Text("case", given.Element("name").Value), Written.Array("generations", all.Select(one => one.Result)))));
        }
    }

    private static ClientOptions Options(XElement given)
    {
        string ca = given.Element("ca_file").Value, certificate = given.Element("cert_file").Value;
        var options = new ClientOptions
        {
            ApiKey = given.Element("api_key").Value,
            Patience = Seconds(given, "patience_s"),
            Retries = (int)given.Element("retries")
        };
        if (ca != "")
        {
            options.Tls = true;
            options.CaPem = File.ReadAllText(ca);
            options.ServerName = given.Element("server_name").Value;
        }
        if (certificate != "")
        {
            options.CertificatePem = File.ReadAllText(certificate);
            options.KeyPem = File.ReadAllText(given.Element("key_file").Value);
        }
        int maxMessageBytes = (int)given.Element("max_message_bytes");
        if (maxMessageBytes > 0) options.MaxMessageBytes = maxMessageBytes;
        return options;
    }

    private static XElement Generate(Client client, XElement given, string request)
    {
        var seen = new Seen();
        TimeSpan timeout = Seconds(given, "timeout_s");
        GenerateRequest message = GenerateRequest.FromJson(request);
        if (given.Element("init_image_file").Value is string file && file != "")
        {
            message.InitImage = client.UploadImage(File.ReadAllBytes(file));
            message.Mask = client.UploadImage(File.ReadAllBytes(given.Element("mask_file").Value));
        }
        double[] interval = given.Element("guidance_interval").Elements().Select(share => (double)share).ToArray();
        if (interval.Length > 0)
        {
            message.GuidanceInterval = new GuidanceInterval(interval[0], interval[1]);
            message.GuidanceRescale = (double)given.Element("guidance_rescale");
        }
        int minNumSteps = (int)given.Element("min_num_steps");
        if (minNumSteps > 0) message.QualityFloor = new QualityFloor { MinNumSteps = minNumSteps };
        using (Generation generation = client.Generate(
            message, timeout > TimeSpan.Zero ? timeout : (TimeSpan?)null))
        {
            try
            {
                bool measures = (bool)given.Element("measure");
                foreach (Event next in generation) See(seen, next, generation, given, measures);
                if ((bool)given.Element("watch_again")) seen.Watched = WatchAgain(client, seen.Generation);
            }
            catch (SafelightException error)
            {
                seen.Error = error;
            }
        }
        return seen.Write();
    }

    private static void See(Seen seen, Event next, Generation generation, XElement given, bool measures)
    {
        if (next is Accepted accepted)
        {
            seen.Generation = accepted.Generation;
            seen.Reliable.Add("accepted");
        }
        else if (next is Progress progress)
        {
            seen.Steps.Add(Written.Array("item", new[] {
                Written.Number("item", progress.OutputIndex), Written.Number("item", progress.Step) }));
            int cancelAt = (int)given.Element("cancel_at_step");
            if (cancelAt > 0 && progress.Step >= cancelAt && seen.Cancelled.IsEmpty) seen.Cancelled = Cancel(generation);
        }
        else if (next is Preview && measures)
        {
            seen.ReceivedUs.Add((DateTime.UtcNow - Epoch).Ticks / 10);
        }
        else if (next is Preview preview)
        {
            seen.Previews.Add(Describe(
                preview,
                Written.Number("step", preview.Step),
                Written.Number("num_bytes", preview.Data.Length),
                Written.Number("num_dropped", preview.NumDropped)));
            Thread.Sleep(Seconds(given, "pause_s"));
        }
        else if (next is Picture picture)
        {
            seen.Reliable.Add("picture");
            seen.Pictures.Add(Describe(
                picture, Written.Text("seed", picture.Seed.ToString()), Written.Text("sha256", Sha256(picture.Data))));
        }
        else if (next is Finished finished)
        {
            seen.Reliable.Add("finished");
            seen.NumSteps = finished.NumSteps;
        }
    }

    private static XElement Cancel(Generation generation)
    {
        GenerationInfo ended = generation.Cancel();
        return Written.Object(
            "cancelled",
            Written.Text("state", ended.State),
            Written.Array("steps", ended.Outputs.Select(output => Written.Number("item", output.Step))));
    }

    /// <summary>Watches a generation again; returns the events, and what the server reports of it and its models.</summary>
    private static XElement WatchAgain(Client client, string name)
    {
        var reliable = new List<string>();
        var sums = new SortedDictionary<int, string>();
        using (Generation generation = client.Watch(name))
        {
            foreach (Event next in generation)
            {
                if (next is Accepted) reliable.Add("accepted");
                if (next is Finished) reliable.Add("finished");
                if (next is Picture picture)
                {
                    reliable.Add("picture");
                    sums[picture.OutputIndex] = Sha256(picture.Data);
                }
            }
        }
        return Written.Object(
            "watched",
            Written.Array("reliable", reliable.Select(one => Written.Text("item", one))),
            Written.Array("sha256", sums.Values.Select(one => Written.Text("item", one))),
            Written.Text("state", client.Get(name).State),
            Written.Array("models", client.Models().Select(model => Written.Text("item", model.Name))));
    }

    private static XElement Describe(Image image, params XElement[] more) => Written.Object("item", new[] {
        Written.Number("output_index", image.OutputIndex),
        Written.Text("media_type", image.MediaType),
        Written.Number("width_px", image.WidthPx),
        Written.Number("height_px", image.HeightPx),
        Written.Number("stride_bytes", image.StrideBytes) }.Concat(more).ToArray());

    private static string Sha256(byte[] data)
    {
        using (SHA256 hash = SHA256.Create()) return string.Concat(hash.ComputeHash(data).Select(one => one.ToString("x2")));
    }

    private static TimeSpan Seconds(XElement given, string field) => TimeSpan.FromSeconds((double)given.Element(field));
}
